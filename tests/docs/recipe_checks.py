"""Check that each toy of `recipe_toys.py` works: a script per recipe, run in the copy."""

from __future__ import annotations

CHECKS = {
    "A divergence": """
import torch
from megatron_kd.config import load_config
from megatron_kd.losses import DenseTeacher, Divergence, linear_divergence
torch.manual_seed(0)
hidden, weight, teacher = torch.randn(6, 4), torch.randn(9, 4), torch.randn(6, 4)
labels = torch.randint(0, 9, (6,))
def kd(divergence):
    return linear_divergence(
        hidden, weight, labels, DenseTeacher(teacher, weight), divergence=divergence, alpha=1.0
    ).kd
kl = kd("forward_kl")
assert torch.allclose(kd("scaled_kl"), 3 * kl, rtol=1e-5)
assert torch.allclose(kd(Divergence("scaled_kl", toy_factor=5.0)), 5 * kl, rtol=1e-5)
overrides = ["--distill.divergence", "scaled_kl", "--distill.toy_factor", "2"]
config = load_config(["--config", RUN_FILE, *overrides])
assert config.distill.divergence == "scaled_kl"
""",
    "A metric": """
from megatron_kd.losses.token_metrics import TOKEN_METRICS
from megatron_kd.telemetry.metrics import metrics_reference
assert "student_perplexity" in metrics_reference()
import json
lines = train("--train.steps", "2")
assert all(1 < line["student_perplexity"] < 1e4 for line in lines)
""",
    "A token rule": """
lines = train("--train.steps", "2", "--distill.adaptive.method", "doubled", teacher="uniform")
assert lines[-1]["kd_loss"] >= 0
""",
    "A schedule": """
words = ["--train.steps", "3", "--optimizer.schedule", "halved", "--optimizer.warmup_steps", "0"]
lines = train(*words)
assert [line["learning_rate"] for line in lines] == [0.0005] * 3
""",
    "A teacher source": """
lines = train("--train.steps", "2", teacher="uniform")
assert lines[0]["kd_loss"] > 0
""",
    "A kind of tokenizer, an input format": """
from pathlib import Path
from megatron_kd.data.preparation.documents import FORMATS
assert "paragraphs" in FORMATS
""",
    "A loss term": """
import torch
from megatron_kd.config import load_config
from megatron_kd.head.options import HeadOptions
from megatron_kd.losses.linear_loss import linear_loss
from megatron_kd.losses.spec import LossInputs, LossSpec
torch.manual_seed(0)
hidden = torch.randn(6, 1, 4, dtype=torch.float64, requires_grad=True)
weight = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
labels = torch.randint(0, 9, (6, 1))
spec = LossSpec(alpha=0.0, z_loss=0.1, linear_z=0.3)
loss, _ = linear_loss(hidden, weight, LossInputs(labels), None, spec, HeadOptions())
logits = hidden @ weight.T
logsumexp = logits.logsumexp(-1)
plain = logsumexp - logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
plain = plain + 0.1 * logsumexp**2 + 0.3 * logsumexp
assert torch.allclose(loss.total, plain)
for computed, exact in zip(
    torch.autograd.grad(loss.total.sum(), (hidden, weight)),
    torch.autograd.grad(plain.sum(), (hidden, weight)),
):
    assert torch.allclose(computed, exact)
lines = train("--train.steps", "2", "--distill.linear_z", "0.5")
assert lines[0]["total_loss"] > lines[0]["ce_loss"] + 1
""",
    "A model family": """
from megatron_kd.models.huggingface.config_json import model_from_config
model = model_from_config(
    {
        "model_type": "toy", "architectures": ["ToyForCausalLM"], "hidden_size": 16,
        "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "vocab_size": 64, "hidden_act": "silu", "max_position_embeddings": 64,
    },
    setting="model",
)
assert (model.num_layers, model.norm_eps) == (2, 1e-5)
""",
    "A kernel": """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch
from megatron_kd.head.plain_rows import PlainRows
from megatron_kd.head.sizes import buffer_width
from megatron_kd.head.triton_rows import TritonRows
buffer = torch.randn(3, buffer_width(100))
buffer[:, 100:] = -torch.inf
assert torch.equal(TritonRows(buffer, 100).largest(), PlainRows(buffer, 100).largest())
""",
    "An experiment": """
import megatron_kd.sweep.definition.grid as grid
example = Path(grid.__file__).parents[3] / "examples/toy/sweep.toml"
assert [cell.name for cell in grid.resolve(example, Path("out"), small=False).cells] == [
    "rate 0.1", "rate 0.2",
]
""",
    "A plot": """
from megatron_kd.sweep.plots.kinds import PLOT_KINDS
assert PLOT_KINDS["dots"].caption == "Means."
""",
    "A fault": """
from tests.helpers.faults import FAULTS
assert FAULTS["toy"].criterion
""",
}

PRELUDE = """
import json, sys
from pathlib import Path
RUN_FILE = sys.argv[1]

def train(*words, teacher="none"):
    from tests.helpers.tiny import write_tokens
    from megatron_kd.pretrain import main
    folder = Path.cwd()
    tokens = write_tokens(folder, tokens=3000)
    content = Path(RUN_FILE).read_text().replace("TOKENS", tokens)
    Path("run.toml").write_text(content)
    options = ["--teacher.source", teacher, "--distill.alpha", "0.5", "--distill.top_k", "101"]
    code = main(["--config", "run.toml", *words, *(options if teacher != "none" else [])])
    assert code == 0, code
    return [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
"""

RUN_FILE = """
[model]
hidden_size = 16
num_layers = 2
num_attention_heads = 2
ffn_hidden_size = 32
vocab_size = 101
[data]
train = ["TOKENS"]
[batch]
global_batch_size = 2
micro_batch_size = 1
sequence_length = 16
[optimizer]
learning_rate = 1e-3
[train]
steps = 2
device = "cpu"
precision = "fp32"
[telemetry]
tensorboard = false
progress = "off"
peak_tflops = 1.0
log_interval = 1
[run]
directory = "run"
"""
