"""Puts a model, its card and the card's pictures into a repository on the Hub, in one commit.

    python -m eval.publish --model RUN/model --card model_cards/khronos.md --repo USER/NAME [--bundle-code] [--dry-run]

What goes along is named in `FILES` and `WEIGHTS`; checkpoints, logs and whatever else lies in the folder do not. Needs
`hf auth login`, or a token in HF_TOKEN.
"""

import argparse
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

import leviathan
from eval.card import commit, value
from leviathan.bundling import PACKAGES, ROOT, flat_name
from leviathan.repository import ENTRY, export
from training.provenance import write_text

LICENSE = Path(__file__).resolve().parent.parent / "LICENSE"
CONFIG, INDEX, WHOLE = "config.json", "model.safetensors.index.json", "model.safetensors"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
FILES = (
    *(CONFIG, "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja"),
)
# Of an earlier commit, where this one does not have them: they would be loaded, or mislead. Modules of others stay.
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
]
STALE = ["*.safetensors", INDEX, *(f"{name}.py" for name in (ENTRY, *map(flat_name, MODULES)) if name)]
PIPELINES = {"khronos": "tabular-regression", "sna": "tabular-regression", "span": "reinforcement-learning"}
LINK = re.compile(r"\]\(([^)\s]+)\)")
LOADED = re.compile(r'(from_pretrained\(|\bpath = )"[^"]+"')  # in code: where the model was when the card was written
PYTHON = re.compile(r"^```python\n.*?^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Repository:
    """What would be uploaded.

    Attributes:
        folder: Where it lies.
        files: Paths in it, in alphabetical order.
        left_out: Names in the model's folder that do not go along.
    """

    folder: Path
    files: tuple[str, ...]
    left_out: tuple[str, ...]


def assemble(
    model: Path, card: Path, repo: str, out: Path, *, bundle_code: bool = False, results: Path | None = None
) -> Repository:
    """Puts together a repository in an empty folder.

    Args:
        model: A folder that `save_pretrained` has written.
        card: Markdown with metadata in front; what it links to lies beside it.
        repo: The id that the README names, user/name.
        out: The folder.
        bundle_code: Whether the code comes along, see :func:`leviathan.export`.
        results: A record of eval.rollout or eval.language whose figures become the model index.

    Raises:
        ValueError: If the model is not whole, the card has no metadata or links to what is not there, the record is of
            another kind, or the id is none.
    """
    validate_repo_id(repo)
    if "/" not in repo:
        raise ValueError(f"repo = {repo!r}; expected user/name.")
    chosen = _chosen(model)
    for name in chosen:
        shutil.copyfile(model / name, out / name)
    text = card.read_text(encoding="utf-8")
    for link in _links(text):
        source, parts = card.parent / link, Path(link).parts
        leads_out = ".." in parts or not source.resolve().is_relative_to(card.parent.resolve())
        if leads_out or Path(link).is_absolute() or not source.is_file():
            raise ValueError(f"{card} links to {link}, which is no file beside it; write the card anew.")
        if Path(link).as_posix() in chosen and not source.samefile(model / link):
            raise ValueError(f"{card} links to {link}, which would take the place of the model's; rename it.")
        (out / link).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, out / link)
    config = _read(model / CONFIG)
    training = _read(model / "training.json") if (model / "training.json").is_file() else None
    write_text(out / "README.md", _readme(text, card, repo, config, chosen, training, results))
    if bundle_code:
        export(out, bundle_code=True)
        shutil.copyfile(LICENSE, out / LICENSE.name)
        readme = (out / "README.md").read_text(encoding="utf-8")
        write_text(out / "README.md", readme.replace("from_pretrained(path, trust", f'from_pretrained("{repo}", trust'))
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    return Repository(out, tuple(files), tuple(sorted({path.name for path in model.iterdir()} - set(chosen))))


def _chosen(model: Path) -> list[str]:
    """Names of the files in a model's folder that make it up."""
    if not (model / CONFIG).is_file():
        raise ValueError(f"{model} has no {CONFIG}; give a folder that save_pretrained has written.")
    tensors: dict[str, set[str]] = {WHOLE: set()}  # by file, those that the index says are there
    if not (model / WHOLE).is_file():
        if not (model / INDEX).is_file():
            raise ValueError(f"{model} has neither {WHOLE} nor {INDEX}; only weights in safetensors are published.")
        shards = _read(model / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ValueError(f"{model / INDEX} has no weight_map of tensors and shards; save the model again.")
        tensors = {str(name): {key for key, shard in shards.items() if shard == name} for name in shards.values()}
    for name, expected in sorted(tensors.items()):
        if name != WHOLE and not SHARD.fullmatch(name):
            raise ValueError(
                f"{model / INDEX} names {name!r}; expected shards beside it, model-00001-of-00002.safetensors."
            )
        try:
            with safe_open(model / name, "pt") as file:
                missing = expected - set(file.keys())
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{model / name} is missing or not whole ({error}); save the model again.") from error
        if missing:
            raise ValueError(f"{model / name} lacks {sorted(missing)[0]}, which {INDEX} says it has; save it again.")
    index = [] if WHOLE in tensors else [INDEX]
    return [name for name in FILES if (model / name).is_file()] + index + sorted(tensors)


def _links(text: str) -> Iterable[str]:
    """What a card links to within its repository."""
    return sorted({link for link in LINK.findall(text) if not re.match(r"[a-z]+:|#", link)})


def _readme(
    text: str,
    card: Path,
    repo: str,
    config: Mapping[str, Any],
    chosen: Sequence[str],
    training: Mapping[str, Any] | None,
    results: Path | None,
) -> str:
    """The card with the metadata of this model, the repository's id in its code, and a section on the repository."""
    try:
        readme = ModelCard(text)
    except yaml.YAMLError as error:
        raise ValueError(f"the metadata of {card} are no YAML: {error}") from error
    if not readme.data.license:
        raise ValueError(f"{card} has no metadata with a license in front; write it with its command in eval.")
    readme.data.library_name = readme.data.library_name or "transformers"
    readme.data.pipeline_tag = _pipeline_tag(config, chosen) or readme.data.pipeline_tag
    if results is not None:
        readme.data.model_name = repo.partition("/")[2]
        readme.data.eval_results = eval_results(_read(results))
    body = PYTHON.sub(lambda block: LOADED.sub(rf'\1"{repo}"', block[0]), readme.text)
    readme.text = f"{body.rstrip()}\n\n{_about(repo, config, chosen, training)}"
    return str(readme)


def _pipeline_tag(config: Mapping[str, Any], chosen: Sequence[str]) -> str | None:
    architecture, kind = (config.get("architectures") or [""])[0], config.get("model_type")
    if architecture.endswith("ForClassification"):
        return "tabular-classification"
    if architecture.endswith("ForCausalLM") and "tokenizer.json" in chosen:
        return "text-generation"
    return PIPELINES.get(kind)


def _about(repo: str, config: Mapping[str, Any], chosen: Sequence[str], training: Mapping[str, Any] | None) -> str:
    """The section that says how to load the repository, and which run its weights are of."""
    architecture = (config.get("architectures") or ["AutoModel"])[0]
    ours = hasattr(leviathan, architecture)
    imports = {"leviathan": [architecture] * ours, "transformers": [architecture] * (not ours)}
    lines = [f'model = {architecture}.from_pretrained("{repo}")']
    if "preprocessor_config.json" in chosen:
        imports["leviathan"].insert(0, "FieldTokenizer")
        lines.append(f'tokenizer = FieldTokenizer.from_pretrained("{repo}")')
    lines = [*(f"from {package} import {', '.join(names)}" for package, names in imports.items() if names), "", *lines]
    run = ""
    if training is not None:
        made = training.get("provenance")
        run = f"The weights are those of `{value(training, 'provenance.command')}`, commit {commit(made)}.\n\n"
    code = "\n".join(lines)
    return f"## This repository\n\n{run}```python\n{code}\n```\n"


def eval_results(record: Mapping[str, Any]) -> list[EvalResult]:
    """The figures of a record of eval.rollout or eval.language, as the Hub's metadata has them.

    Raises:
        ValueError: If the record is of another kind.
    """
    if "rows" in record and "spectra" in record:
        step = record["spectra"]["steps"][-1]
        source = "simulated flows" if record["data"]["synthetic"] else "PDEBench"
        about = {"task_type": "other", "task_name": f"rollout of {step} steps", "dataset_type": "turbulence"}
        about |= {"dataset_name": source, "dataset_split": record["config"]["split"]}
        return [
            EvalResult(
                **about,
                metric_type=metric,
                metric_name=f"{record['metrics'][metric]['label']}, step {step}, {row}",
                metric_value=score["mean"][step - 1],
            )
            for row, found in record["rows"].items()
            if found["kind"] == "model"
            for metric, score in found["metrics"].items()
        ]
    if "perplexity" in record and "bits_per_byte" in record:
        about = {"task_type": "text-generation", "dataset_type": "text", "dataset_split": record["config"]["split"]}
        about |= {"dataset_name": Path(record["config"]["data"]).name}
        names = {"loss": "nats per token", "perplexity": "perplexity", "bits_per_byte": "bits per byte"}
        return [
            EvalResult(**about, metric_type=metric, metric_name=name, metric_value=record[metric]["mean"])
            for metric, name in names.items()
        ]
    raise ValueError(
        f"a record of {', '.join(sorted(record)[:6])} ... has no figures of one model; give results.json of "
        "eval.rollout or language.json of eval.language."
    )


def upload(repository: Repository, repo: str, private: bool = False) -> str:
    """Uploads in one commit, and takes away what an earlier one had of weights and modules; returns the commit's URL.

    Raises:
        ValueError: If the repository shall be private and is there already, for all to see.
        OSError: If the Hub refuses.
    """
    api = HfApi()
    api.create_repo(repo, private=private, exist_ok=True)
    if private and not api.repo_info(repo).private:
        raise ValueError(f"{repo} is there already and public; make it private on the Hub, or choose another name.")
    about = api.upload_folder(
        repo_id=repo,
        folder_path=repository.folder,
        commit_message=f"Model and card by leviathan-sna {leviathan.__version__}",
        delete_patterns=STALE,
    )
    return about.commit_url


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}; expected an object.")
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder that save_pretrained has written")
    parser.add_argument("--card", type=Path, required=True, help="model card, with its pictures beside it")
    parser.add_argument("--repo", required=True, help="user/name on the Hub")
    parser.add_argument("--results", type=Path, help="results.json of eval.rollout or language.json of eval.language")
    parser.add_argument("--bundle-code", action="store_true", help="for people who have not installed leviathan-sna")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--dry-run", action="store_true", help="say what would be uploaded, and upload nothing")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    args = parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        try:
            options = {"bundle_code": args.bundle_code, "results": args.results}
            found = assemble(args.model, args.card, args.repo, Path(folder), **options)
            for name in found.files:
                print(f"{(found.folder / name).stat().st_size:>12,}  {name}")
            print(f"left out: {', '.join(found.left_out) or 'nothing'}")
            if args.dry_run:
                print(f"nothing was uploaded to {args.repo}")
            else:
                print(f"uploaded: {upload(found, args.repo, args.private)}")
        except (ValueError, KeyError, OSError) as error:
            raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
