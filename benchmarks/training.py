"""Speed and memory of training on two CPU cores, both sides of every comparison in one run.

    python benchmarks/training.py [chowder] [abmil] [precision] [ragged] [overhead] [memory] [rounds=3]

Features are made: 269 bags of 1,000 x 768 like owkin/camelyon16-features. Prints Markdown. `abmil` needs torchmil
(pip install -e '.[bench]').
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import torch
from machine import machine
from sklearn.metrics import roc_auc_score
from torch import nn

from mil.aggregators import aggregator_class
from mil.aggregators.threads import a_thread_a_bag
from mil.config import Train
from mil.training.bags import Bags, TrainingSteps
from mil.training.module import Members, MembersModule, fit, predict_logits, quiet_lightning

N_BAGS, N_TILES, DIM, FOLDS = 269, 1000, 768, 5
TORCHMILS_OWN = {"hidden": 0, "gated": False, "head": ()}
"""ABMIL as torchmil has it when nothing is set: attention of width 128 over the features, a linear classifier."""
TUTORIAL = {"n_top": 5, "n_bottom": 5, "tile_hidden": (), "head": (200, 100)}
"""Chowder as in Owkin's Camelyon16 tutorial."""


def main() -> None:
    arguments = sys.argv[1:]
    rounds = next((int(a.removeprefix("rounds=")) for a in arguments if a.startswith("rounds=")), 3)
    parts = {
        "chowder": chowder,
        "abmil": abmil,
        "precision": precision,
        "ragged": ragged,
        "overhead": overhead,
        "memory": memory,
    }
    if "memory-child" in arguments:
        return memory_child(arguments[-1])
    print(f"Command: `python benchmarks/training.py {' '.join(arguments)}`\n")
    print(machine("torch", "lightning", "numpy") + "\n")
    for name in [a for a in arguments if a in parts] or parts:
        parts[name](rounds)
    return None


def make_bags(lengths: np.ndarray, dtype: torch.dtype = torch.float16) -> Bags:
    """Random features in one block, as `mil.training.bags.load_bags` holds them."""
    block = torch.empty(int(lengths.sum()), DIM, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for chunk in block.split(100_000):
        chunk.copy_(torch.randn(chunk.shape, generator=generator))
    names = tuple(f"slide_{i}" for i in range(len(lengths)))
    return Bags(names, lengths, DIM, "ram", tuple(block.split(lengths.tolist())))


def camelyon_like() -> tuple[Bags, np.ndarray]:
    labels_S = (np.random.default_rng(0).random(N_BAGS) < 0.41).astype(np.int64)
    return make_bags(np.full(N_BAGS, N_TILES)), labels_S


def folds(n_bags: int, n_folds: int = FOLDS, validate: bool = False) -> Members:
    """Members of a cross-validation; `validate`: every epoch ends with a pass over the slides left out."""
    train_MS = np.stack([np.arange(n_bags) % FOLDS != f for f in range(n_folds)])
    val_MS = ~train_MS if validate else np.zeros_like(train_MS)
    return Members(np.full(n_folds, 1e-3), np.zeros(n_folds), train_MS, val_MS)


def module_of(
    name: str,
    bags: Bags,
    labels_S: np.ndarray,
    members: Members,
    epochs: int,
    precision: str = "32-true",
    seed: int = 0,
    **options,
) -> MembersModule:
    aggregator = aggregator_class(name)(DIM, 1, [100 * seed + m for m in range(len(members))], **options)
    select = "best" if members.val_MS.any() else "last"
    settings = Train(epochs=epochs, precision=precision, select=select)
    return MembersModule(aggregator, bags, labels_S, 2, members, settings, seed=seed)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def in_turn(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side in each round, in an order drawn anew each round: whoever comes first finds caches and
    memory as the last one left them."""
    rng = np.random.default_rng(0)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name in rng.permutation(list(sides)):
            times[name].append(sides[name]())
    return times


def fit_as_users_do(module: MembersModule) -> None:
    """With checkpoints and logs, as `mil.train` does it, but no progress bar."""
    with tempfile.TemporaryDirectory() as folder:
        fit(module, Path(folder) / "checkpoints", Path(folder) / "logs", progress=False)


# --- parts -----------------------------------------------------------------------------------------------------------


def chowder(rounds: int) -> None:
    """Tutorial setting, 5 folds, 15 epochs, then predictions of every member for every slide."""
    bags, labels_S = camelyon_like()
    training, prediction = [], []
    for _ in range(rounds):
        module = module_of("chowder", bags, labels_S, folds(N_BAGS), 15, **TUTORIAL)
        training.append(seconds(lambda m=module: fit_as_users_do(m)))  # type: ignore[misc]
        prediction.append(seconds(lambda m=module: predict_logits(m, list(range(N_BAGS)))))  # type: ignore[misc]
    print("## Chowder, tutorial setting: 269 x 1,000 x 768, 5 folds, 15 epochs\n")
    print("| part | median s | all |\n| --- | --- | --- |")
    both = [t + p for t, p in zip(training, prediction, strict=True)]
    for name, values in (("training", training), ("evaluation", prediction), ("both", both)):
        print(f"| {name} | {median(values):.1f} | {', '.join(f'{v:.1f}' for v in values)} |")
    print()


def abmil(rounds: int, epochs: int = 3) -> None:
    """One epoch of one fold: ours (five folds in one pass, divided by five; one alone) beside torchmil's Trainer."""
    bags, labels_S = camelyon_like()
    print(f"## ABMIL against torchmil {version('torchmil')}: seconds per fold and epoch, 269 x 1,000 x 768, batch 16\n")
    print(
        "| architecture | ours, five in a pass | ours, one alone | ours, five in bf16-mixed | torchmil, in memory "
        "| torchmil, from files | ratios five | ratios one alone | ratios bf16-mixed |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        write_torchmil_files(Path(folder), bags, labels_S)
        sources = {"memory": in_memory(bags, labels_S), "files": from_files(Path(folder))}
        for architecture, options in {"torchmil's ABMIL as it comes": TORCHMILS_OWN, "the Phikon paper's": {}}.items():

            def ours(precision: str, options: dict = options, members: int = FOLDS) -> float:
                stack = module_of("abmil", bags, labels_S, folds(N_BAGS, members), epochs, precision, **options)
                return seconds(lambda: fit_as_users_do(stack)) / members / epochs

            def theirs(source: str, options: dict = options) -> float:
                train, left_out = sources[source]
                return seconds(torchmil_epochs(epochs, train, left_out[:1], options)) / epochs

            sides = {
                "five": partial(ours, "32-true"),
                "alone": partial(ours, "32-true", members=1),
                "bf16": partial(ours, "bf16-mixed"),
                "memory": partial(theirs, "memory"),
                "files": partial(theirs, "files"),
            }
            m = {name: median(values) for name, values in in_turn(sides, rounds).items()}
            ratios = " | ".join(f"{m['memory'] / m[k]:.2f}, {m['files'] / m[k]:.2f}" for k in ("five", "alone", "bf16"))
            shown = " | ".join(f"{value:.2f}" for value in m.values())
            print(f"| {architecture} | {shown} | {ratios} |", flush=True)
    print(
        "\ntorchmil's ABMIL as it comes: attention 128 over 768 features, linear classifier; ours with model.hidden=0"
    )
    print(
        "model.gated=false model.head=[]. The paper's: 768 - 128, gated attention 128, 128 - 128 - 64 - 1; our default."
    )
    print("Ratios: torchmil in memory / ours, torchmil from files / ours. torchmil's Trainer knows float32 only, and")
    print(f"gets a single validation bag. {epochs} epochs each, so that neither side pays for its start alone, in an")
    print("order drawn anew each round; with our checkpoints and logs.\n")


def precision(rounds: int) -> None:
    """What bf16-mixed does to the result: out-of-fold AUC on a cohort that can be learned, same seeds."""
    bags, labels_S = camelyon_like()
    generator = torch.Generator().manual_seed(1)
    direction_D = torch.randn(DIM, generator=generator).half()
    for i in np.flatnonzero(labels_S):
        bags.features(int(i))[:10] += 0.2 * direction_D  # ten witness tiles
    print("## ABMIL in float32 and in bf16-mixed: out-of-fold AUC, 5 folds, 10 epochs, 10 witnesses in 1,000 tiles\n")
    print("| seed | float32 | bf16-mixed | largest difference of a probability |\n| --- | --- | --- | --- |")
    members = folds(N_BAGS)
    for seed in range(rounds):
        p_NS = []
        for setting in ("32-true", "bf16-mixed"):
            module = module_of("abmil", bags, labels_S, members, 10, setting, seed=seed)
            fit(module, progress=False)
            logits_MS = predict_logits(module, list(range(N_BAGS)))[:, :, 0]
            p_NS.append(1 / (1 + np.exp(-logits_MS[~members.train_MS])))
        labels_N = np.broadcast_to(labels_S, members.train_MS.shape)[~members.train_MS]
        aucs = " | ".join(f"{roc_auc_score(labels_N, p_S):.4f}" for p_S in p_NS)
        print(f"| {seed} | {aucs} | {np.abs(p_NS[0] - p_NS[1]).max():.3f} |")
    print()


def write_torchmil_files(folder: Path, bags: Bags, labels_S: np.ndarray) -> None:
    for kind in ("features", "labels"):
        (folder / kind).mkdir()
    for i, name in enumerate(bags.slides):
        np.save(folder / "features" / f"{name}.npy", bags.features(i).float().numpy())
        np.save(folder / "labels" / f"{name}.npy", labels_S[i])


def from_files(folder: Path):
    """Training bags of a fold and those left out, by torchmil's own dataset over .npy files: what its tutorials use."""
    from torchmil.datasets import ProcessedMILDataset

    folders = {"features_path": str(folder / "features"), "labels_path": str(folder / "labels")}
    train, left_out = (
        ProcessedMILDataset(**folders, bag_names=[f"slide_{i}" for i in chosen], bag_keys=["X", "Y"], verbose=False)
        for chosen in first_fold()
    )
    return train, [left_out[i] for i in range(len(left_out))]


def in_memory(bags: Bags, labels_S: np.ndarray):
    """The same bags without any reading, float32 as torchmil wants them."""
    from tensordict import TensorDict

    return [
        [TensorDict({"X": bags.features(i).float(), "Y": torch.tensor(labels_S[i])}) for i in chosen]
        for chosen in first_fold()
    ]


def first_fold() -> tuple[list[int], list[int]]:
    return [i for i in range(N_BAGS) if i % FOLDS], [i for i in range(N_BAGS) if i % FOLDS == 0]


def paper_head() -> nn.Module:
    return nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 1))


def torchmil_epochs(epochs: int, train, left_out, options: dict) -> Callable[[], object]:
    """Epochs of torchmil's Trainer with its default metric (accuracy)."""
    from torchmil.data import collate_fn
    from torchmil.models import ABMIL
    from torchmil.utils import Trainer

    model = ABMIL(in_shape=(DIM,))
    if options != TORCHMILS_OWN:
        model = ABMIL(in_shape=(DIM,), att_dim=128, gated=True, feat_ext=nn.Linear(DIM, 128))
        model.classifier = paper_head()
    loader = torch.utils.data.DataLoader(train, batch_size=16, shuffle=True, collate_fn=collate_fn)
    validation = torch.utils.data.DataLoader(left_out, batch_size=16, collate_fn=collate_fn)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    trainer = Trainer(model, optimizer, device="cpu", verbose=False, disable_pbar=True)
    return lambda: trainer.train(epochs, loader, validation)


def ragged(rounds: int) -> None:
    """200 bags of 50 to 10,000 tiles: packed against a padded batch of the same model, one member each."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(1500), 1.0, 200), 50, 10_000).astype(np.int64)
    bags, labels_S = make_bags(lengths), np.arange(200) % 2
    members = Members(np.full(1, 1e-3), np.zeros(1), np.ones((1, 200), dtype=bool), np.zeros((1, 200), dtype=bool))
    packed, padded = [], []
    for _ in range(rounds):
        module = module_of("abmil", bags, labels_S, members, 1)
        packed.append(seconds(lambda m=module: fit_as_users_do(m)))  # type: ignore[misc]
        padded.append(seconds(lambda: padded_epoch(bags, labels_S)))
    sizes = f"{lengths.min()} to {lengths.max():,} tiles, {lengths.sum():,} in all"
    print(f"## ABMIL on ragged bags: 200 bags, {sizes}, batch 16\n")
    print("| | median s an epoch | all |\n| --- | --- | --- |")
    for name, values in (("packed (ours, with Lightning)", packed), ("padded, bare loop", padded)):
        print(f"| {name} | {median(values):.1f} | {', '.join(f'{v:.1f}' for v in values)} |")
    print(f"\nRatio {median(padded) / median(packed):.1f}.\n")


class PaddedABMIL(nn.Module):
    """The same network as `mil.aggregators.abmil.ABMIL`, on a padded batch with a mask."""

    def __init__(self):
        super().__init__()
        self.embed, self.attend, self.gate = nn.Linear(DIM, 128), nn.Linear(128, 128), nn.Linear(128, 128)
        self.score, self.head = nn.Linear(128, 1), paper_head()

    def forward(self, x_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        h_BTH = self.embed(x_BTD)
        scores_BT = self.score(torch.tanh(self.attend(h_BTH)) * torch.sigmoid(self.gate(h_BTH))).squeeze(2)
        weights_BT = scores_BT.masked_fill(~mask_BT, -torch.inf).softmax(dim=1)
        return self.head(torch.einsum("bt,bth->bh", weights_BT, h_BTH)).squeeze(1)


def padded_epoch(bags: Bags, labels_S: np.ndarray) -> None:
    model = PaddedABMIL()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    order = np.random.default_rng(0).permutation(len(bags))
    for start in range(0, len(order), 16):
        chosen = order[start : start + 16]
        x_BTD = nn.utils.rnn.pad_sequence([bags.features(i).float() for i in chosen], batch_first=True)
        mask_BT = torch.arange(x_BTD.shape[1]) < torch.from_numpy(bags.lengths_S[chosen]).unsqueeze(1)
        logits_B = model(x_BTD, mask_BT)
        targets_B = torch.from_numpy(labels_S[chosen]).float()
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(logits_B, targets_B).backward()
        optimizer.step()


def overhead(rounds: int) -> None:
    """Lightning's Trainer, with checkpoints, logs and AUC, against a bare loop over the same module."""
    bags, labels_S = camelyon_like()
    print("## Lightning's overhead: the same module in a Trainer (checkpoints, logs, AUC) and in a bare loop\n")
    print("| aggregator | epochs | Trainer, median s | bare loop, median s | ratio |\n| --- | --- | --- | --- | --- |")
    for name, epochs, options in (("chowder", 15, TUTORIAL), ("abmil", 1, {})):
        with_trainer, bare = [], []
        for _ in range(rounds):
            module = module_of(name, bags, labels_S, folds(N_BAGS), epochs, **options)
            with_trainer.append(seconds(lambda m=module: fit_as_users_do(m)))  # type: ignore[misc]
            module = module_of(name, bags, labels_S, folds(N_BAGS), epochs, **options)
            bare.append(seconds(lambda m=module, e=epochs: bare_loop(m, e)))  # type: ignore[misc]
        ratio = median(with_trainer) / median(bare)
        print(f"| {name}, 5 folds | {epochs} | {median(with_trainer):.2f} | {median(bare):.2f} | {ratio:.2f} |")
    print()


def bare_loop(module: MembersModule, epochs: int) -> None:
    optimizer = module.configure_optimizers()
    now = [0]
    steps = TrainingSteps(
        module.bags, module.labels_S, module.members.train_MS, 16, 0, lambda: now[0], lambda: module.active_M
    )
    with a_thread_a_bag(module.aggregator):
        for now[0] in range(epochs):
            for batch in steps:
                optimizer.zero_grad()
                losses_MB = module.losses(module.aggregator(batch).logits_MBC, batch.labels_B) * batch.uses_MB
                (losses_MB.sum(dim=1) / batch.uses_MB.sum(dim=1).clamp_min(1)).sum().backward()
                optimizer.active_M = batch.uses_MB.any(dim=1)
                optimizer.step()


def memory(rounds: int) -> None:
    """Peak memory of a process that trains, against its features as stored."""
    print("## Peak memory of training, 269 x 1,000 x 768 float16, 5 folds\n")
    print(
        "| aggregator | features as stored, GB | peak of the process, GB | difference, GB |\n| --- | --- | --- | --- |"
    )
    for name in ("chowder", "abmil"):
        command = [sys.executable, __file__, "memory-child", name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        stored, peak = (float(v) for v in printed.split())
        print(f"| {name} | {stored:.2f} | {peak:.2f} | {peak - stored:.2f} |")
    print()


def memory_child(name: str) -> None:
    bags, labels_S = camelyon_like()
    with quiet_lightning():
        fit_as_users_do(module_of(name, bags, labels_S, folds(N_BAGS), 1, **(TUTORIAL if name == "chowder" else {})))
    status = Path("/proc/self/status").read_text().splitlines()  # getrusage would count the parent's peak before exec
    peak_kb = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    print(bags.nbytes / 1e9, peak_kb * 1024 / 1e9)


if __name__ == "__main__":
    main()
