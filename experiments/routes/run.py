"""Through which positions does an answer travel, by kind of question? Writes routes.csv."""

from pathlib import Path

import pandas as pd

import mechmm as mm
from mechmm.data import shapes

KINDS = ("color", "digit", "same", "horizontal")
SPANS = ("object", "question", "last")
N_PAIRS, SEED = 32, 11


def main() -> None:
    model = mm.HookedMultimodal.from_pretrained("mechmm/demo")
    places = mm.sites.residual(model, SPANS, towers=["language"])
    tables = []
    for kind in KINDS:
        pairs = shapes.pairs(model, kind, N_PAIRS, seed=SEED)
        check = pairs.check(model)
        kept = pairs[(check["clean_right"] & check["flips"]).to_numpy()]
        found = mm.patch(model, kept, places, n_null=10, seed=SEED).to_dataframe()
        tables.append(found.assign(kind_of_question=kind, pairs=len(kept)))
        wide = found.pivot_table(index="layer", columns="span", values="effect")[list(SPANS)]
        print(f"\n{kind}, {len(kept)} of {N_PAIRS} pairs\n{wide.round(2)}")
    columns = ["kind_of_question", "pairs", "layer", "span", "effect", "low", "high"]
    whole = pd.concat(tables)[[*columns, "null_low", "null_high"]]
    whole.round(4).to_csv(Path(__file__).parent / "routes.csv", index=False)


if __name__ == "__main__":
    main()
