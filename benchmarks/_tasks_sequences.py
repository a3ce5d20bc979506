"""The parts of `tasks.py` on sequences: associative recall and bytes."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from _tasks_common import Beside, Clock, mixers_of, say, searched, told

from mixnas.search_space.architecture import Architecture

RATES = (2e-3, 5e-3)  # the best of which counts, as in the paper (which tries four)
LONGER = {"steps": 2500, "batch_size": 64}  # than a trial's: attention alone finds the answer late and at once


def stack(width: int, mixers: list[Any], **more: Any) -> Architecture:
    """A stack of mixers without channel mixers, the paper's, or with what is said."""
    blocks = [{"mixer": mixer, "channel_mixer": "none", **more} for mixer in mixers]
    stem = {"name": "embedding", "position": "learned"}
    return Architecture.from_dict({"stem": stem, "norm": "layer", "stages": [{"width": width, "blocks": blocks}]})


def mqar(args: Any, clock: Clock) -> None:
    """Zoology's smallest setting (64 tokens, 4 pairs, width 64, two layers) at a vocabulary of 256 of its 8,192."""
    with tempfile.TemporaryDirectory() as name:
        changes = ["task={name: mqar, vocab_size: 256, length: 64, pairs: 4, label_smoothing: 0}", *args.set]
        run, took = searched("mqar-hybrids", Path(name), *clock.settings("mqar-hybrids", search=0.5, changes=changes))
        beside = Beside(run)
        attention, convolution = {"name": "attention", "heads": 1}, {"name": "short_conv_gate", "kernel_size": 3}
        stacks = {
            "attention": [attention, attention],
            "gated convolution": [convolution, convolution],
            "hybrid": [convolution, attention],
        }
        asked = [(label, lr) for lr in RATES for label in stacks]  # each has been tried once when time gets short
        found = beside.trained(
            [(stack(64, stacks[label]), replace(beside.config.train, lr=lr, **LONGER)) for label, lr in asked], clock
        )
        references = {}
        for label in stacks:
            tried = [one | {"lr": lr} for (of, lr), one in zip(asked, found, strict=True) if of == label and one]
            if not tried:
                raise SystemExit(f"mqar: no time was left to train {label}. Give a longer --budget.")
            references[label] = max(tried, key=lambda one: one["test_recall"]) | {
                "tried": [[t["lr"], t["test_recall"]] for t in tried]
            }
            say(f"{label}: {references[label]['test_recall']:.4f}")
        record = told(run, took)
        for member in record["front"]:
            used = mixers_of(member["architecture"])
            member["attention_blocks"], member["blocks"] = used.count("attention"), len(used)
        closed = [m for m in record["front"] if m["test_recall"] >= 0.99 and m["attention_blocks"] < 2]
        clock.write(
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


SIZES = ((32, 1), (32, 2), (48, 2), (64, 2), (64, 3), (64, 4))
"""Widths and depths of the transformers beside the front of `bytes`."""

SLOWER = 1 / 3
"""Transformers are trained at the run's learning rate and at this share of it, as it may be too high for attention."""


def transformer(width: int, depth: int) -> Architecture:
    """Attention with four heads and a channel mixer four times as wide, throughout; learned positions, as the space."""
    block = {"mixer": {"name": "attention", "heads": 4}, "channel_mixer": {"name": "mlp", "expansion": 4}}
    return Architecture.from_dict(
        {
            "stem": {"name": "embedding", "position": "learned"},
            "norm": "rms",
            "stages": [{"width": width, "blocks": [block] * depth}],
        }
    )


def bytes_(args: Any, clock: Clock) -> None:
    """A front of bits per byte against latency, and transformers of the same space, trained as long."""
    with tempfile.TemporaryDirectory() as name:
        settings = clock.settings("bytes", profile=0.06, supernet=0.25, search=0.12, final=0.13, changes=args.set)
        run, took = searched("bytes", Path(name), *settings)
        beside = Beside(run)
        # The dearest first: the two ends of the comparison are there when time gets short.
        order = sorted(SIZES, key=lambda size: (size not in (SIZES[0], SIZES[-1]), -size[0] * size[1]))
        lr = beside.config.final.train.lr
        recipes = [replace(beside.config.final.train, lr=rate) for rate in (lr, SLOWER * lr)]
        asked = [(size, recipe) for recipe in recipes for size in order]
        found = beside.trained([(transformer(*size), recipe) for size, recipe in asked], clock)
        done = []
        for width, depth in order:
            tried = [
                one | {"width": width, "depth": depth, "lr": recipe.lr}
                for (size, recipe), one in zip(asked, found, strict=True)
                if one and size == (width, depth)
            ]
            if tried:
                done.append(
                    min(tried, key=lambda one: one["test_bits_per_byte"])
                    | {"tried": [[one["lr"], one["test_bits_per_byte"]] for one in tried]}
                )
        if not done:
            raise SystemExit("bytes: no time was left to train a transformer. Give a longer --budget.")
        transformers = sorted(done, key=lambda one: one["latency_ms"])
        record = told(run, took)
        for one in transformers:
            quicker = [m for m in record["front"] if m["latency_ms"] <= one["latency_ms"]]
            best = min(quicker, key=lambda m: m["test_bits_per_byte"], default=None)
            one["best_of_the_front_no_slower"] = None if best is None else best["id"]
            one["bits_saved"] = None if best is None else one["test_bits_per_byte"] - best["test_bits_per_byte"]
            against = "no network of the front is as quick" if best is None else f"{one['bits_saved']:.3f} bits saved"
            say(
                f"transformer {one['width']}x{one['depth']}: {one['test_bits_per_byte']:.3f} bits, "
                f"{one['latency_ms']:.3f} ms; {against}"
            )
        used = sorted({mixer for member in record["front"] for mixer in mixers_of(member["architecture"])})
        clock.write(
            "bytes",
            {
                **record,
                "final_steps": beside.config.final.train.steps,
                "mixers_on_the_front": used,
                "transformers": transformers,
                "left_out": [[*size, recipe.lr] for (size, recipe), one in zip(asked, found, strict=True) if not one],
                "better_at_each_latency": bool(transformers)
                and all((one["bits_saved"] or -1) > 0 for one in transformers),
            },
        )
