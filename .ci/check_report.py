"""Check a demo's report: everybody contributed, rounds were whole, the model learnt. Prints what it found."""

import json
import sys
from pathlib import Path

report = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
gain = 1 - report["heldout_loss_end"] / report["heldout_loss_start"]
wrong = [
    text
    for text, holds in {
        "three volunteers": report["volunteers"] == 3,
        "each contributed samples": all(report["samples_per_volunteer"].values()),
        "the samples that the volunteers counted themselves": report["samples"]
        == sum(report["samples_per_volunteer"].values())
        == report["samples_by_their_own_count"],
        "at least 8 rounds": report["rounds"] >= 8,
        "at most one round in ten failed": report["failed_rounds"] <= report["rounds"] / 10,
        "nine tenths of the time spent computing": report["computing_share"] >= 0.9,
        "held-out loss at least 8 % lower": gain >= 0.08,
        "a model": (Path(report["model_dir"]) / "model.safetensors").is_file(),
    }.items()
    if not holds
]
sys.stdout.write(
    f"demo: {report['rounds']} rounds, {report['failed_rounds']} failed, computing {report['computing_share']:.1%}, "
    f"{report['samples_per_volunteer']}, "
    f"held-out loss {report['heldout_loss_start']:.3f} -> {report['heldout_loss_end']:.3f} (-{gain:.1%})\n"
)
if wrong:
    sys.exit("the demo's report lacks: " + "; ".join(wrong))
