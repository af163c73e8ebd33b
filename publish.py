"""Publish a trained model on the Hugging Face hub, with all that is needed to ask it in the words it was trained with.

Published are the merged weights (safetensors), the tokenizer with the chat template and the prompts that the stages used,
a model card, the results in the hub's form, and a manifest with the SHA-256 of every file. Nothing else leaves this
machine: no pickle, no optimizer state, no checkpoint, no log. --llm-model NAME of every stage then pulls the model and
uses the prompts and the template that come with it.

--dry_run writes the same files to look at, prints their sizes, and uploads nothing. HF_TOKEN, or `hf auth login`, gives
the token; HF_ENDPOINT another hub.

Reads    DynamicRAG_llama3_8b                       a model folder, or training output: its dpo/, or else its sft/
         results/llama3_8b_nq.json.metrics.json     metrics of evaluate.py, for card and results (--results)
Writes   <MODEL>.published                          card, manifest, prompts, template and results, as they are uploaded
         standard output                            every file with its size

    python publish.py DynamicRAG_llama3_8b --repo OWNER/NAME --results results/llama3_8b_nq.json.metrics.json
"""

import argparse
import fnmatch
import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import orjson

from dynamicrag import stage
from dynamicrag.evaluation.tables import markdown_table
from dynamicrag.files.atomic import atomic_writer
from dynamicrag.files.hub_access import check_account, upload
from dynamicrag.llm.engine import resolve_model
from dynamicrag.llm.model_files import MANIFEST, MODEL_FILES, PROMPTS, PUBLISHED, TEMPLATE, prompts_for, prompts_yaml
from dynamicrag.llm.prompts import Prompts, add_prompts_flag
from dynamicrag.llm.templates import AUTO, PromptTokenizer, load_prompts
from dynamicrag.models.chat_templates import SAMPLE, read_template
from dynamicrag.models.checkpoints import read_json
from dynamicrag.report import card
from dynamicrag.rows.manifest import fingerprint, versions
from dynamicrag.rows.tasks import TASKS
from dynamicrag.stage import UserError, log

PICKLED_WEIGHTS = re.compile(r"(?!training_args|optimizer|scheduler|scaler|rng_state).*\.(bin|pt|pth|ckpt|pkl|pickle)")
# Keys that name a folder of this machine, or a template other than the published one.
PRIVATE_KEYS = {"config.json": ("_name_or_path",), "tokenizer_config.json": ("name_or_path", "chat_template")}
EVAL_DATASET = "gasolsun/DynamicRAG-Eval-Data"
EVAL_TASKS = {
    **{name: name for name in ("nq", "triviaqa", "hotpotqa", "2wikimqa", "popqa", "fever", "eli5")},
    "asqa": "asqa_eval_gtr_top100", "arc": "arc_challenge",
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = stage.ArgumentParser(__doc__)
    parser.add_argument("model", nargs="?", metavar="MODEL", default="DynamicRAG_llama3_8b", help="folder of the model, or training output")
    hub = parser.add_argument_group("hub")
    hub.add_argument("--repo", metavar="OWNER/NAME", help="repository of the hub; it is made if it does not exist")
    hub.add_argument("--private", action="store_true", help="make the repository private; a public one is refused")
    hub.add_argument("--dry_run", action="store_true", help="write and print what would be uploaded, and upload nothing")
    content = parser.add_argument_group("content")
    content.add_argument("--results", nargs="+", metavar="METRICS", default=[], help="metrics files of evaluate.py")
    add_prompts_flag(content)
    content.add_argument("--template", default=AUTO, help="chat template that the stages used: a file, or auto as in inference.py")
    content.add_argument("--output_dir", help="folder of the files that are written (default: <MODEL>.published)")
    told = parser.add_argument_group("card")
    told.add_argument("--license", help="licence of the weights, as the hub calls it, such as apache-2.0 or llama3")
    told.add_argument("--language", nargs="+", default=["en"], help="languages of the training data")
    told.add_argument("--base_model", metavar="OWNER/NAME", help="model before training (default: that of the recipe)")
    told.add_argument("--datasets", nargs="+", metavar="OWNER/NAME", help="data sets of the hub that it was trained on")
    told.add_argument("--eval_dataset", metavar="OWNER/NAME", default=EVAL_DATASET, help="benchmark on the hub to which the results belong")
    return parser.parse_args(argv)


def files_to_publish(model: Path, template: str) -> dict[str, Path]:
    """Return the files of a model that are published, by name.

    Raises UserError for adapters, for weights that are pickled, incomplete or absent, and for a training that goes on.
    """
    if (model / "adapter_config.json").is_file():
        config = read_json(str(model), "adapter_config.json")
        given = Path(template).stem if template != AUTO else "TEMPLATE"
        words = ["llamafactory-cli", "export", "--model_name_or_path", config.get("base_model_name_or_path") or "BASE", "--adapter_name_or_path",
                 str(model), "--template", given, "--finetuning_type", "lora", "--export_dir", f"{model}_merged", "--export_device", "cpu"]
        raise UserError(f"{model}: is an adapter, not a model; merge it with {shlex.join(words)}")
    if (model / "training_on.sha256").is_file():
        raise UserError(f"{model}: its training has not finished; run the training script again to finish it")
    names = sorted(path.name for path in model.iterdir() if path.is_file())
    if pickled := [name for name in names if PICKLED_WEIGHTS.fullmatch(name)]:
        raise UserError(f"{model / pickled[0]}: pickled weights can run code when they are loaded; save the model as safetensors, and move this file away")
    if not any(name.endswith(".safetensors") for name in names):
        raise UserError(f"{model}: has no weights (*.safetensors); give the folder of a trained model")
    for index in (name for name in names if name.endswith(".safetensors.index.json")):
        wanted = set(read_json(str(model), index)["weight_map"].values())
        if missing := sorted(wanted - set(names)):
            raise UserError(f"{model / missing[0]}: is missing, and {index} names it; copy the model again")
    return {name: model / name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in MODEL_FILES)}


def without_private_keys(path: Path) -> bytes | None:
    """Return a JSON file without its PRIVATE_KEYS; None if it has none of them."""
    content = read_json(str(path.parent), path.name) if path.name in PRIVATE_KEYS else {}
    if not (found := [key for key in PRIVATE_KEYS.get(path.name, ()) if key in content]):
        return None
    return orjson.dumps({key: value for key, value in content.items() if key not in found}, option=orjson.OPT_INDENT_2)


def digests(files: Mapping[str, Path]) -> dict[str, dict]:
    """Return size in bytes and SHA-256 of every file, with a progress bar."""
    from tqdm import tqdm

    found = {}
    with tqdm(total=sum(path.stat().st_size for path in files.values()), unit="B", unit_scale=True, desc="SHA-256") as progress:
        for name, path in sorted(files.items()):
            with path.open("rb") as file:
                found[name] = {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
            progress.update(found[name]["bytes"])
    return found


def check_results(systems: list[card.System], model: Path, prompts: Prompts, template: PromptTokenizer) -> list[card.System]:
    """Warn about results that were made with another model, other prompts or another template. Returns the results of this model, and
    those whose model is not known.
    """
    own = []
    for system in systems:
        if system.manifest is None:
            log.warning("%s: its results file is not here, so that the model of its answers is not known", system.name)
            own.append(system)
            continue
        arguments = system.manifest["arguments"]
        if fingerprint(model) not in system.manifest["inputs"].values():
            log.warning("%s: was answered by %s, not by the model that is published; it is in the card only", system.name, arguments.get("llm_model"))
            continue
        own.append(system)
        for flag, differs in (
            ("prompts", lambda path: Prompts(path).for_file() != prompts.for_file()),
            ("template", lambda path: PromptTokenizer(template.tokenizer, read_template(path)).ids(SAMPLE) != template.ids(SAMPLE)),
        ):
            used = arguments.get(flag)
            if used and Path(used).is_file() and differs(used):
                log.warning("%s: was answered with --%s %s, which is not what is published", system.name, flag, used)
    return own


def write_files(contents: Mapping[str, str | bytes], folder: Path) -> dict[str, Path]:
    """Write each content to the folder under its name. Returns the paths by name."""
    paths = {name: folder / name for name in contents}
    for name, content in contents.items():
        paths[name].parent.mkdir(parents=True, exist_ok=True)
        with atomic_writer(paths[name]) as file:
            file.write(content if isinstance(content, bytes) else content.encode())
    return paths


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    # What is published
    if not (args.repo or args.dry_run):
        raise UserError("--repo: is needed to publish; give OWNER/NAME, or --dry_run")
    is_adapter = (Path(args.model) / "adapter_config.json").is_file()
    model = Path(args.model if is_adapter else resolve_model(args.model))
    if not model.is_dir():
        raise UserError(f"{model}: is no folder; give the folder of a model, or the output of training")
    files = files_to_publish(model, args.template)
    if not args.dry_run:
        check_account(args.repo)
    # What the card says
    prompts_file = prompts_for(str(model), args.prompts)
    prompts, template, systems = Prompts(prompts_file), load_prompts(str(model), args.template), card.read_results(args.results)
    own_systems = check_results(systems, model, prompts, template)
    training, known_base = card.training_of(model)
    base = args.base_model or known_base
    log.info("base model: %s", base or "not known; give --base_model")
    if not args.license:
        log.warning("--license: is not given; the card says that the terms of the base model and of the data apply")

    # Write the files that are made here
    folder = Path(args.output_dir or f"{model}.published")
    tasks = EVAL_TASKS if args.eval_dataset == EVAL_DATASET else {name: name for name in TASKS}
    cleaned = {name: content for name, path in files.items() if (content := without_private_keys(path)) is not None}
    scores = card.evaluation_files(own_systems, args.eval_dataset, tasks)
    log.info("%d files of results for %s (--eval_dataset)", len(scores), args.eval_dataset)
    own = "the model's own" if template.name.startswith("the chat template of") else Path(template.name).name
    version = f"dynamicrag {versions().get('dynamicrag', 'that is not installed')}"
    origins = {"prompts": Path(prompts_file).name if prompts_file else f"the defaults of {version}", "template": own}
    metadata = {
        "license": args.license, "base_model": base, "datasets": args.datasets, "language": args.language, "library_name": "transformers",
        "pipeline_tag": "text-generation", "tags": ["dynamicrag", "retrieval-augmented-generation", "reranking"],
    }
    readme = card.render_card(
        metadata, name=(args.repo or model.name).split("/")[-1], repo=args.repo or str(model), results=card.results_table(systems), training=training,
        origins=origins, examples=card.examples_of(prompts, template), version=version, prompts_file=PROMPTS, template_file=TEMPLATE, manifest_file=MANIFEST,
    )
    files |= write_files({**cleaned, **scores, PROMPTS: prompts_yaml(prompts), TEMPLATE: template.chat_template, "README.md": readme}, folder)
    manifest = {
        "repo": args.repo, "base_model": base, "files": digests(files), "origins": origins,
        "training": [{key: value for key, value in run.items() if key != "shown"} for run in training],
        "results": [{"system": system.name, "arguments": card.shown_arguments(system), **system.summary} for system in systems],
        "versions": versions(),
    }
    files |= write_files({MANIFEST: orjson.dumps(manifest, option=orjson.OPT_INDENT_2)}, folder)
    # Show, and upload
    sizes = {name: path.stat().st_size for name, path in sorted(files.items())}
    print(markdown_table(["file", "bytes"], [[name, f"{size:,}"] for name, size in [*sizes.items(), ("total", sum(sizes.values()))]]))
    if args.dry_run:
        log.info("nothing was uploaded; the card is %s", folder / "README.md")
        return
    log.info("%s: published in %s; the card is %s", args.repo, upload(args.repo, args.private, files, PUBLISHED), folder / "README.md")


if __name__ == "__main__":
    stage.run(main)
