"""Write the training recipes and the settings file of a base model from the facts about it.

Reads    recipes/models/NAME.yaml       the facts; docs/pipeline.md describes them (Base models)
         recipes/recipe.yaml.jinja      the form of a recipe
Writes   recipes/NAME/*.yaml            full training, LoRA and QLoRA, each SFT and DPO; full training and LoRA of best-of-n and KTO
         recipes/dataset_info.json      entries of the sets that are made from the model's trajectories
         configs/NAME.env               only if it is not there: a settings file is yours to edit

    python scripts/recipes.py qwen3_8b
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import jinja2
from training_memory import GPUS, KINDS, RANK, ROOM, WINDOWS, Shape, memory_of, total_of, window_of

from dynamicrag import stage
from dynamicrag.files.atomic import atomic_writer
from dynamicrag.llm.prompts import read_yaml
from dynamicrag.stage import UserError, log

HERE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Model:
    """The facts about a base model."""

    hub: str
    template: str
    window: int
    shape: Shape
    settings: dict = field(default_factory=dict)


def read_model(path: Path) -> Model:
    """Return the facts of a file. Raises UserError for an unknown, missing or wrong fact."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; write one like recipes/models/llama3_8b.yaml")
    facts = read_yaml(path, "facts")

    def checked(kind: type, given: object, where: str) -> dict:
        if not isinstance(given, dict):
            raise UserError(f"{path}: {where}expected a mapping of facts; see recipes/models/llama3_8b.yaml")
        known = {fact.name: fact for fact in fields(kind)}
        for name, fact in known.items():
            wanted = {Shape: dict}.get(fact.type, fact.type)
            value = given.get(name)
            if name not in given and fact.default is fact.default_factory:
                raise UserError(f"{path}: {where}{name}: is missing; see recipes/models/llama3_8b.yaml")
            if name in given and (type(value) is not wanted or (wanted is int and value < 1)):
                raise UserError(f"{path}: {where}{name}: expected a {wanted.__name__}{' of at least 1' if wanted is int else ''}, found {value!r}")
        if unknown := sorted(set(map(str, given)) - set(known)):
            raise UserError(f"{path}: {where}{unknown[0]}: unknown; the facts are {', '.join(known)}")
        return given

    facts = checked(Model, facts, "")
    return Model(**{**facts, "shape": Shape(**checked(Shape, facts["shape"], "shape."))})


def recipe_text(name: str, model: Model, recipe: str, tokens: int) -> str:
    """Return a recipe as LLaMA-Factory reads it."""
    kind, shape = KINDS[recipe], model.shape
    weights = 2 * (shape.linear + shape.embedding) / 1e9
    optimizer = 6 * weights
    disk = {"weights": weights, "optimizer": optimizer, "checkpoint": 12 * shape.adapter / 1e9 if kind.adapter else optimizer + 2 * weights}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "recipes"), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("recipe.yaml.jinja").render(
        **asdict(model), **asdict(kind), data=kind.data, name=name, recipe=recipe, tokens=tokens, rank=RANK, room=ROOM[kind.card], disk=disk,
        parts=memory_of(shape, recipe, tokens), total=total_of(shape, recipe, tokens), whole=total_of(shape, recipe, model.window),
        half=total_of(shape, recipe, tokens, GPUS // 2),
    )


def settings_text(name: str, model: Model) -> str:
    """Return a settings file: the model's facts, and configs/llama3_8b.env for all else."""
    lines = [
        f"# {model.hub} on Wikipedia. Settings that are not here are those of configs/llama3_8b.env.",
        f"MODEL=${{MODEL:-{name}}}", f"BASE_MODEL=${{BASE_MODEL:-{model.hub}}}", f"TEMPLATE=${{TEMPLATE:-template/{model.template}.jinja}}",
        f"N_DOCS_SHOWN=${{N_DOCS_SHOWN:-{40 * model.window // 8192}}}  # 20 for a window of 4096 tokens, 40 for 8192",
        f"ENGINE_FLAGS=${{ENGINE_FLAGS:---max-model-len {model.window}}}",
        "source configs/llama3_8b.env",
    ]
    return "\n".join(lines) + "\n"


def with_sets(info: dict, name: str) -> dict:
    """Return a dataset_info.json with the entries of the sets that are made from a model's trajectories."""
    pair = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected", "system": "system"}
    single = {"prompt": "instruction", "query": "input", "response": "output", "system": "system"}
    kinds = {"dpo": {"ranking": True, "columns": pair}, "best_of_n": {"columns": single}, "kto": {"columns": {**single, "kto_tag": "kto_tag"}}}
    return info | {f"{name}_{role}_{kind}": {"file_name": f"../training_data/{name}_{role}_{kind}.json", **entry}
                   for kind, entry in kinds.items() for role in ("reranker", "generator")}


def info_text(info: dict) -> str:
    """Return dataset_info.json with one line per key of an entry."""
    entries = (f"  {json.dumps(name)}: {{\n" + ",\n".join(f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in entry.items()) + "\n  }"
               for name, entry in info.items())
    return "{\n" + ",\n".join(entries) + "\n}\n"


def parse_args(argv=None):
    parser = stage.ArgumentParser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models; each has a file recipes/models/NAME.yaml (default: all of them)")
    parser.add_argument("--project_dir", default=HERE, type=Path, help="folder with recipes/ and configs/, to read and to write")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    recipes = args.project_dir / "recipes"
    models = {name: read_model(recipes / f"models/{name}.yaml") for name in args.names or sorted(path.stem for path in (recipes / "models").glob("*.yaml"))}
    for name, model in models.items():
        windows = {recipe: window_of(model.shape, recipe, model.window) for recipe in KINDS}
        for recipe, tokens in windows.items():
            path = recipes / f"{name}/{recipe}.yaml"
            if tokens is None:
                path.unlink(missing_ok=True)  # of other facts
                log.warning("recipes/%s/%s.yaml is not written: %d tokens do not fit its GPUs", name, recipe, model.window * WINDOWS[KINDS[recipe].card][-1] // 8)
                continue
            write(path, recipe_text(name, model, recipe, tokens))
        info = recipes / "dataset_info.json"
        write(info, info_text(with_sets(json.loads(info.read_text(encoding="utf-8")), name)))
        settings = args.project_dir / f"configs/{name}.env"
        if not settings.exists():
            write(settings, settings_text(name, model))
        log.info("wrote recipes/%s/ (%d recipes); the settings are in configs/%s.env", name, sum(map(bool, windows.values())), name)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_writer(path) as file:
        file.write(text.encode())


if __name__ == "__main__":
    stage.run(main)
