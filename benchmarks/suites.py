"""The command of `make bench`: that of users, extended by the character model and the speed targets."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dlkernels.bench import plots
from dlkernels.bench.cli import Command, Job, Part, attention_grid, fast_dtypes, layer_grid, peer_grid
from dlkernels.bench.runner import AnyCase, Runner
from dlkernels.bench.timing import Budget

from . import charlm, switched, targets
from .models import MODELS


def layer_targets(args: argparse.Namespace) -> Sequence[AnyCase]:
    return targets.layers(args.threads or (1, 2))


def attention_targets(args: argparse.Namespace) -> Sequence[AnyCase]:
    return targets.attention(args.threads or (1, 2))


def models(args: argparse.Namespace) -> Sequence[Any]:
    return switched.cases(tuple(MODELS), fast_dtypes(args), args.threads or (torch.get_num_threads(),), 1.0)


class ProjectCommand(Command):
    prog = "python -m benchmarks"
    suites: Mapping[str, Sequence[Part]] = {
        "main": (layer_grid, attention_grid),
        "grid": (layer_grid, attention_grid),
        "attention": (attention_grid,),
        "targets": (layer_targets, attention_targets),
        "attention-targets": (attention_targets,),
        "charlm": (),
        "models": (models,),
        "peers": (peer_grid,),
        "all": (layer_grid, attention_grid, layer_targets, attention_targets),
    }
    suite_help = "main (the default) is charlm and grid, all adds targets"

    def jobs(self, args: argparse.Namespace) -> list[Job]:
        if args.suite not in ("main", "charlm", "all") or args.only:
            return []
        threads = max(args.threads) if args.threads else torch.get_num_threads()
        make = charlm.Config.quick if args.quick else charlm.Config
        return [functools.partial(_train, make(mode), threads) for mode in ("lstm", "gru")]

    def seconds(self, args: argparse.Namespace) -> float:
        return 2.0 if args.suite.endswith("targets") else super().seconds(args)

    def runner(self, budget: Budget) -> Runner:
        return switched.ModelRunner(budget)

    def draw(self, doc: dict[str, Any], path: Path) -> list[Path]:
        made = plots.draw(doc, path)
        if doc["charlm"]:
            made.append(charlm.curves(doc, path.with_name(path.stem + "-charlm.png")))
        return made


def _train(config: charlm.Config, threads: int) -> dict[str, Any]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        trained = charlm.train_both(config)
    finally:
        torch.set_num_threads(before)
    print("\n" + charlm.text(trained), flush=True)
    return trained
