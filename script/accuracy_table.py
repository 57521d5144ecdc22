"""Zero-shot accuracies of finished runs as one table, with standard errors.

    python script/accuracy_table.py results/*/run.json

A row is a run: its accuracies after pruning; runs with --eval_dense also give a row of the dense model. The mean is of
accuracies not normalised by length, as in the paper; its standard error takes the tasks' as independent.
"""

import argparse
import json
import math
from pathlib import Path


def rows(record: dict) -> list[tuple[str, dict[str, tuple[float, float]]]]:
    """(name, {task: (accuracy, standard error)}) of each stage of a run that was evaluated."""
    found, config = record["zero_shot"], record["config"]
    names = {"dense": "dense", "pruned": f"`{config['prune_method']}` {config['sparsity_ratio']:g}"}
    return [
        (
            names[stage],
            {task: (entry[stage]["acc"], entry[stage]["acc_stderr"]) for task, entry in found["tasks"].items()},
        )
        for stage in found["stages"]
        if found["mean"][stage] is not None
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path)
    records = [json.loads(path.read_text(encoding="utf-8")) for path in parser.parse_args().records]
    found = dict(row for record in records if record.get("zero_shot") for row in rows(record))
    tasks = list(dict.fromkeys(task for accuracies in found.values() for task in accuracies))
    print(f"| model | {' | '.join(tasks)} | mean |\n|---|{'---|' * (len(tasks) + 1)}")
    for name, accuracies in sorted(found.items(), key=lambda row: row[0] != "dense"):
        cells = [f"{100 * accuracies[task][0]:.1f} ± {100 * accuracies[task][1]:.1f}" for task in tasks]
        mean = sum(accuracies[task][0] for task in tasks) / len(tasks)
        error = math.sqrt(sum(accuracies[task][1] ** 2 for task in tasks)) / len(tasks)
        print(f"| {name} | {' | '.join(cells)} | {100 * mean:.1f} ± {100 * error:.1f} |")


if __name__ == "__main__":
    main()
