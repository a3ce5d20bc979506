"""The parts of `tasks.py` on sequences: associative recall and bytes."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from _tasks_common import Beside, mixers_of, say, searched, told, write

from mixnas.search_space.architecture import Architecture

RATES = (3e-3, 7e-3)  # the best of which counts, as in the paper (which tries four)


def stack(width: int, mixers: list[Any], **more: Any) -> Architecture:
    """A stack of mixers without channel mixers, the paper's, or with what is said."""
    blocks = [{"mixer": mixer, "channel_mixer": "none", **more} for mixer in mixers]
    stem = {"name": "embedding", "position": "learned"}
    return Architecture.from_dict({"stem": stem, "norm": "layer", "stages": [{"width": width, "blocks": blocks}]})


def mqar(args: Any) -> None:
    """Zoology's smallest setting (64 tokens, 4 pairs, width 64, two layers) at a vocabulary of 256 of its 8,192."""
    with tempfile.TemporaryDirectory() as name:
        changes = ["task={name: mqar, vocab_size: 256, length: 64, pairs: 4, label_smoothing: 0}", *args.set]
        run, took = searched("mqar-hybrids", Path(name), *changes)
        beside = Beside(run)
        attention, convolution = {"name": "attention", "heads": 1}, {"name": "short_conv_gate", "kernel_size": 3}
        stacks = {
            "attention": [attention, attention],
            "gated convolution": [convolution, convolution],
            "hybrid": [convolution, attention],
        }
        references = {}
        for label, mixers in stacks.items():
            tried = [
                beside.trained(stack(64, mixers), replace(beside.config.train, lr=lr)) | {"lr": lr} for lr in RATES
            ]
            references[label] = max(tried, key=lambda one: one["test_recall"]) | {
                "tried": [t["test_recall"] for t in tried]
            }
            say(f"{label}: {references[label]['test_recall']:.4f}")
        record = told(run, took)
        for member in record["front"]:
            used = mixers_of(member["architecture"])
            member["attention_blocks"], member["blocks"] = used.count("attention"), len(used)
        closed = [m for m in record["front"] if m["test_recall"] >= 0.99 and m["attention_blocks"] < 2]
        write(
            "mqar",
            {
                **record,
                "setting": "64 tokens, 4 pairs, width 64, two layers of Zoology; vocabulary 256 of its 8,192",
                "references": references,
                "attention_reaches_0.99": references["attention"]["test_recall"] >= 0.99,
                "gap_of_gated_convolutions": references["attention"]["test_recall"]
                - references["gated convolution"]["test_recall"],
                "closes_it_with_less_attention": [m["id"] for m in closed],
            },
        )


def bytes_(args: Any) -> None:
    """A front of bits per byte against latency, and transformers of the same space trained as long."""
    with tempfile.TemporaryDirectory() as name:
        run, took = searched("bytes", Path(name), *args.set)
        beside = Beside(run)
        transformers = []
        for width, depth in ((32, 1), (32, 2), (48, 2), (64, 2), (64, 3), (64, 4)):
            blocks = [
                {
                    "mixer": {"name": "attention", "heads": 4},
                    "channel_mixer": {"name": "mlp", "expansion": 4},
                }
            ] * depth
            plain = {
                "stem": {"name": "embedding", "position": "learned"},
                "norm": "rms",
                "stages": [{"width": width, "blocks": blocks}],
            }
            transformers.append(beside.trained(Architecture.from_dict(plain)) | {"width": width, "depth": depth})
            last = transformers[-1]
            say(f"transformer {width}x{depth}: {last['test_bits_per_byte']:.3f} bits, {last['latency_ms']:.3f} ms")
        record = told(run, took)
        for one in transformers:
            quicker = [m for m in record["front"] if m["latency_ms"] <= one["latency_ms"]]
            best = min(quicker, key=lambda m: m["test_bits_per_byte"], default=None)
            one["best_of_the_front_no_slower"] = None if best is None else best["id"]
            one["bits_saved"] = None if best is None else one["test_bits_per_byte"] - best["test_bits_per_byte"]
        used = sorted({mixer for member in record["front"] for mixer in mixers_of(member["architecture"])})
        write(
            "bytes",
            {
                **record,
                "mixers_on_the_front": used,
                "transformers": transformers,
                "better_at_each_latency": all((one["bits_saved"] or -1) > 0 for one in transformers),
            },
        )
