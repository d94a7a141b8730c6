"""Fill the generated parts of the documentation from the code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def divergences_reference() -> str:
    """Return a Markdown table of the declared divergences."""
    from megatron_kd.config.declarations.divergences import DIVERGENCES

    lines = ["| Name | Sum over ids | Direction | Source | Parameters |", "|---|---|---|---|---|"]
    for name, divergence in DIVERGENCES.items():
        parameters = ", ".join(
            f"`{parameter.name}` ({parameter.default})" for parameter in divergence.parameters
        )
        cells = (divergence.formula, divergence.direction, divergence.source, parameters)
        escaped = " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells)
        lines.append(f"| `{name}` | {escaped} |")
    return "\n".join(lines)


def contributing() -> str:
    """Return the recipes of CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return text[text.index("## Recipes") :]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace each placeholder by what is rendered from the declarations."""
    if "<!-- contributing -->" in markdown:
        markdown = markdown.replace("<!-- contributing -->", contributing())
    if "<!-- run file reference -->" in markdown:
        from megatron_kd.config.key_reference import run_file_reference

        markdown = markdown.replace("<!-- run file reference -->", run_file_reference())
    if "<!-- divergences -->" in markdown:
        markdown = markdown.replace("<!-- divergences -->", divergences_reference())
    if "<!-- metrics reference -->" in markdown:
        from megatron_kd.telemetry.metrics import metrics_reference

        markdown = markdown.replace("<!-- metrics reference -->", metrics_reference())
    return markdown
