"""Trainable CT from different starts and parameterisations, on validation and test data.

    python docs/experiments/starts.py 'flexure:resnet20?weights=FILE' idx:FOLDER --out starts.json

Every arm is trained once from each seed with the same head, order and number of epochs, its
learning rate fixed beforehand; nothing is chosen here.
"""

from __future__ import annotations

import argparse

import flexure
from flexure.data import batches, load_data, split
from flexure.record import record, write_json
from flexure.train import step_schedule

ARMS = {
    "published": flexure.TrainableCT(parameterization="sigmoid"),
    "published_from_half": flexure.TrainableCT(parameterization="sigmoid", init_beta=0.5),
    "default": flexure.TrainableCT(),
    "default_from_half": flexure.TrainableCT(init_beta=0.5),
}


def main() -> None:
    options = parsed()
    loaded = flexure.load_model(options.model)
    sizes = {"train": options.train_size, "val": options.val_size, "test": options.test_size}
    parts = split(load_data(options.data), seed=options.seed, sizes=sizes)
    train, val, test = (
        batches(part, preprocess=loaded.preprocess, batch_size=256, cache=True)
        for part in (parts.train, parts.val, parts.test)
    )
    found = flexure.tune(
        loaded.model,
        train=train,
        val=val,
        test=test,
        arms={name: (method,) for name, method in ARMS.items()},
        seeds=range(options.seed, options.seed + options.seeds),
        epochs=options.epochs,
        schedule=step_schedule if options.schedule == "published" else None,
        head_learning_rate=options.head_rate,
        head=loaded.head,
    )
    print(found)
    print(
        "\n| arm | validation, % | test, % | 95 % | saturated, % |\n| --- | --- | --- | --- | --- |"
    )
    for arm in found.arms:
        score = sum(run.score for run in arm.runs) / len(arm.runs)
        accuracy, saturated = arm.accuracy, arm.saturated
        assert accuracy is not None
        print(
            f"| {arm.name} | {100 * score:.1f} | {100 * accuracy.mean:.1f} "
            f"| {100 * accuracy.low:.1f} to {100 * accuracy.high:.1f} "
            f"| {'' if saturated is None else f'{100 * saturated:.1f}'} |"
        )
    if options.out:
        kept = found.to_dict()
        for arm in kept["arms"]:
            for run in arm["runs"]:
                run.pop("betas"), run.pop("cs")
        config = {name: value for name, value in vars(options).items() if name != "out"}
        write_json(options.out, record(config=config, seed=options.seed, numbers=kept))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--schedule", choices=("constant", "published"), default="constant")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--head-rate", type=float, default=1e-3)
    for name, size in (("train", 2000), ("val", 1000), ("test", 2000)):
        parser.add_argument(f"--{name}-size", type=int, default=size)
    parser.add_argument("--out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
