"""The chunked output head: logits of a chunk, their statistics, and the autograd function around them."""
