"""Zero-shot accuracies of finished runs as one table, with standard errors.

    python script/accuracy_table.py results/*/run.json

A row is a run, by its name: its accuracies after pruning; runs with --eval_dense also give a row of the dense model.
The mean is of accuracies not normalised by length, as in the paper, over the tasks that every row has; its standard
error takes the tasks' as independent, and is left out where one of them has none.
"""

import argparse
import json
import math
from pathlib import Path

Row = dict[str, tuple[float, float | None]]  # task -> accuracy and its standard error, where there is one


def rows(record: dict) -> dict[str, Row]:
    """Of each stage of a run that was evaluated, by its name in the table."""
    found = record["zero_shot"]
    names = {"dense": f"dense {record['config']['model']}", "pruned": f"`{record['run']}`"}
    return {
        names[stage]: {
            task: (entry[stage]["acc"], entry[stage].get("acc_stderr"))
            for task, entry in found["tasks"].items()
            if entry[stage].get("acc") is not None
        }
        for stage in found["stages"]
        if found["mean"][stage] is not None
    }


def cell(value: float, error: float | None) -> str:
    """In percent."""
    return f"{100 * value:.1f}" if error is None else f"{100 * value:.1f} ± {100 * error:.1f}"


def mean(accuracies: list[tuple[float, float | None]]) -> str:
    values, errors = zip(*accuracies, strict=True)
    return cell(sum(values) / len(values), None if None in errors else math.hypot(*errors) / len(errors))


def table(found: dict[str, Row]) -> str:
    """The rows in Markdown, dense models first."""
    tasks = list(dict.fromkeys(task for row in found.values() for task in row))
    shared = [task for task in tasks if all(task in row for row in found.values())]
    lines = [f"| model | {' | '.join(tasks)} | mean |", f"|---|{'---|' * (len(tasks) + 1)}"]
    for name, row in sorted(found.items(), key=lambda pair: not pair[0].startswith("dense ")):
        cells = [cell(*row[task]) if task in row else "-" for task in tasks]
        cells.append(mean([row[task] for task in shared]) if shared else "-")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path)
    records = [json.loads(path.read_text(encoding="utf-8")) for path in parser.parse_args().records]
    print(table({name: row for record in records if record.get("zero_shot") for name, row in rows(record).items()}))


if __name__ == "__main__":
    main()
