"""Compare hidden states of student and teacher layers, on whatever stages they are."""
