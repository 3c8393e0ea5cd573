"""Train a LoRA adapter that LoRAServe can serve, on a CPU in minutes."""

import argparse
import json
import sys
import warnings
from pathlib import Path

from loraserve.demo.texts import STYLES, Example, examples
from loraserve.errors import LoraServeError
from loraserve.interrupts import hold_back_interrupts

EPILOG = """\
examples:
  scripts/train_adapter --style pirate
        the project's own rows; writes ./pirate-r8 in two or three minutes on two cores
  scripts/train_adapter --style french --rank 32 --targets all --rslora --out my/french
        all seven projections: more capacity, 5 times the bytes of q and v alone
  scripts/train_adapter --texts rows.jsonl --rank 16
        your own rows, one JSON object per line; a few dozen are enough for a style:
        {"question": "What is tea?", "answer": "A drink, my dear."}

what the options do:
  rank      width of the update; size and serving cost grow in proportion to it, quality only at first
  targets   qv: q_proj, v_proj (0.115 MB per rank on the demo model); attention: q, k, v, o;
            all: also gate, up, down (0.6 MB per rank)
  alpha     strength: the update is scaled by alpha/rank, with --rslora by alpha/sqrt(rank)
  epochs    passes over the rows; a loss well under 0.5 is enough if the style shows
If the style does not show, raise --epochs or --learning-rate. If the text becomes garbled, lower them.
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train_adapter", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    rows = parser.add_mutually_exclusive_group(required=True)
    rows.add_argument("--style", choices=STYLES, help="train on the project's rows in this style")
    rows.add_argument("--texts", type=Path, metavar="FILE.jsonl", help="train on your own rows")
    parser.add_argument("--rank", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--targets", choices=("qv", "attention", "all"), default="qv", help="default: %(default)s")
    parser.add_argument("--rslora", action="store_true", help="scale by alpha/sqrt(rank): more stable at high ranks")
    parser.add_argument("--alpha", type=int, help="default: 4 x rank; with --rslora 4 x sqrt(rank)")
    parser.add_argument("--epochs", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write; default: ./NAME-rRANK")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a Hugging Face directory; default: the demo model")
    return parser.parse_args()


def read_rows(path: Path) -> list[Example]:
    """Return the rows of a JSON lines file. Raises ValueError with the line number of a bad row."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error}); write one object per line") from error
        for field in ("question", "answer"):
            if not isinstance(row, dict) or not isinstance(row.get(field), str) or not row[field].strip():
                raise ValueError(f'{where}: field "{field}" must be a text; write {{"question": ..., "answer": ...}}')
        rows.append(Example(row["question"], row["answer"]))
    return rows


def run(args: argparse.Namespace) -> None:
    """Train and write the adapter. Raises OSError, ValueError, ImportError or LoraServeError."""
    rows = read_rows(args.texts) if args.texts else examples(args.style)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    with hold_back_interrupts():
        from loraserve.demo.model import prepare_model
        from loraserve.demo.paths import default_data_dir
        from loraserve.demo.train import TrainConfig, train

    default_alpha = round(4 * (max(args.rank, 0) ** 0.5 if args.rslora else args.rank))
    alpha = default_alpha if args.alpha is None else args.alpha
    config = TrainConfig(args.rank, alpha, args.targets, args.rslora, args.epochs, args.learning_rate, args.seed)
    out = args.out or Path(f"{args.style or args.texts.stem}-r{args.rank}")
    model_dir = args.model or prepare_model(default_data_dir(), say)
    train(rows, model_dir, out, config, say)
    say(f"wrote {out}; to serve it from a running cluster:")
    load = json.dumps({"lora_name": out.name, "lora_path": str(out.resolve())})
    say(f"  curl http://127.0.0.1:8000/v1/load_lora_adapter -H 'Content-Type: application/json' -d '{load}'")


def say(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    args = parse_arguments()
    try:
        run(args)
    except ImportError as error:
        print(f"error: {error}; install the demo extra: pip install -e '.[demo]'", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
    except (LoraServeError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
