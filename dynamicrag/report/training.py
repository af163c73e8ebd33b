"""Training curves: the trainer's log of each model, and the rounds of scripts/iterate.sh."""

import statistics
from collections.abc import Callable
from pathlib import Path

import orjson
from matplotlib.figure import Figure

from dynamicrag.report.drawing import INK, LINE_COLOURS, key, panels, picture
from dynamicrag.report.figures import line
from dynamicrag.report.sections import Section
from dynamicrag.stage import UserError

Logs = dict[str, list[dict]]  # the trainer's log entries by name of the model
DPO_CURVES = {  # title: the trainer's names of the solid and the dashed line
    "DPO loss": ("loss",), "reward accuracy": ("rewards/accuracies",), "reward margin": ("rewards/margins",),
    "reward of the chosen (solid) and rejected (dashed)": ("rewards/chosen", "rewards/rejected"),
}


def _read(path: Path) -> dict:
    try:
        return orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON ({error}); remove it to leave it out of the report") from error


def read_logs(work: Path) -> dict[str, Logs]:
    """Return the logs of the models under `work` by stage: {"sft": {name: log}, "dpo": {name: log}}. Rounds are named by number."""
    logs: dict[str, Logs] = {"sft": {}, "dpo": {}}
    states = [*sorted(work.glob("DynamicRAG_*/*/trainer_state.json")), *sorted(work.glob("rounds/*/DynamicRAG_*/dpo/trainer_state.json"), key=lambda path: _round(path) or 0)]
    models = {path.parent.parent.name for path in states}
    for path in states:
        stage, model = path.parent.name, path.parent.parent.name
        log = [entry for entry in _read(path).get("log_history", []) if "loss" in entry and "step" in entry]
        if stage not in logs or not log:  # best is a link to another folder
            continue
        name = stage.upper() if _round(path) is None else f"round {_round(path)}"
        logs[stage][name if len(models) == 1 else f"{model.removeprefix('DynamicRAG_')}, {name}"] = log
    return logs


def _round(path: Path) -> int | None:
    folder = path.parents[2]
    return int(folder.name) if folder.parent.name == "rounds" and folder.name.isdigit() else None


def read_rounds(work: Path) -> list[dict]:
    """Return the summaries of all rounds, starting with round 0 (the SFT model); an empty list if there are none."""
    path = work / "rounds" / "rounds.json"
    return _read(path)["rounds"] if path.is_file() else []


def sft_curves(logs: Logs, width: int) -> Figure:
    """Plot loss against steps, one line per model."""
    figure, [axes] = panels(1, width, 230, 1)
    for (name, log), colour in zip(logs.items(), LINE_COLOURS * len(logs), strict=False):
        line(axes, [entry["step"] for entry in log], [entry["loss"] for entry in log], color=colour, label=name)
    axes.set(xlabel="optimisation step", ylim=(0, None))
    axes.set_title("SFT loss")
    if len(logs) > 1:
        axes.legend()
    return figure


def dpo_curves(logs: Logs, width: int) -> Figure:
    """Plot loss, reward accuracy, margin and both rewards against steps, one colour per round."""
    logged = {name for log in logs.values() for entry in log for name in entry}
    curves = {title: names for title, names in DPO_CURVES.items() if logged.issuperset(names)}
    colours = dict(zip(logs, LINE_COLOURS * len(logs), strict=False))
    figure, axes = panels(len(curves), width, 230, 2)
    for panel, (title, names) in zip(axes, curves.items(), strict=True):
        for model, log in logs.items():
            for name, dashes in zip(names, ("-", (0, (3, 2))), strict=False):
                points = [(entry["step"], entry[name]) for entry in log if name in entry]
                line(panel, [step for step, _ in points], [value for _, value in points], color=colours[model], linestyle=dashes)
        panel.set(xlabel="optimisation step")
        panel.set_title(title)
        if title == "reward accuracy":
            panel.set_ylim(0, 1.05)
        if title != "DPO loss":
            panel.axhline(0.5 if title == "reward accuracy" else 0, color=INK, linewidth=0.7, linestyle=(0, (2, 3)))
    if len(logs) > 1:
        key(figure, [(name, {"color": colour}) for name, colour in colours.items()])
    return figure


def round_curves(rounds: list[dict], width: int) -> Figure:
    """Plot, by round, the score on held-out questions with its interval, the mean reward and the documents per question."""
    shown: list[tuple[str, Callable[[dict], float | None]]] = [
        ("mean reward of the samples", lambda one: one.get("reward", {}).get("reward", {}).get("mean")),
        ("documents per question", lambda one: one["dev"]["documents"]),
    ]
    figure, axes = panels(1 + len(shown), width, 240, 3)
    scores = [one["dev"] for one in rounds]
    bounds = [[abs(score[side] - score["score"]) for score in scores] for side in ("low", "high")]
    axes[0].errorbar(range(len(rounds)), [score["score"] for score in scores], yerr=bounds, marker="o", color=LINE_COLOURS[0], elinewidth=1)
    axes[0].set_title("score on held-out questions, 0 to 100")
    for panel, (title, value) in zip(axes[1:], shown, strict=True):
        points = [(number, shown_value) for number, one in enumerate(rounds) if (shown_value := value(one)) is not None]
        line(panel, [number for number, _ in points], [point for _, point in points], color=LINE_COLOURS[0])
        panel.set_title(title)
    for panel in axes:
        panel.set(xlabel="round (0: the SFT model)", ylim=(0, None))
        panel.set_xticks(range(len(rounds)))
    return figure


def quarter(log: list[dict]) -> int:
    """Return a quarter of the number of log entries, at least 1."""
    return max(1, len(log) // 4)


def mean(log: list[dict], name: str) -> float:
    """Return the mean of the trainer's value `name` over log entries, because single batches vary."""
    return statistics.fmean(entry[name] for entry in log if name in entry)


def trained(work: Path, folder: Path) -> Section:
    """Return the section with losses and rewards of the models under `work`, and the rounds of scripts/iterate.sh."""
    text = "The trainer's log of each model, and the rounds of preference optimisation."
    section = Section("training", "Training", text)
    logs, rounds = read_logs(work), read_rounds(work)
    if sft := logs["sft"]:
        ends = [
            f"{name}, mean loss {mean(log[:quarter(log)], 'loss'):.2f} over the first quarter of the steps, "
            f"{mean(log[-quarter(log):], 'loss'):.2f} over the last" for name, log in sft.items()
        ]
        caption = f"Behaviour cloning: {'; '.join(ends)}. If points are dense, the thick line is a running mean."
        section.pictures.append(picture(folder, "sft", lambda width: sft_curves(sft, width), caption, caption))
    if dpo := logs["dpo"]:
        ends = []
        for name, log in dpo.items():
            last = log[-quarter(log):]
            means = [f"{title} {mean(last, names[0]):.2f}" for title, names in list(DPO_CURVES.items())[:3] if names[0] in last[-1]]
            ends.append(f"{name}, over the last quarter of the steps: {', '.join(means)}")
        caption = f"Preference optimisation: {'; '.join(ends)}. An accuracy of 0.5 is chance."
        section.pictures.append(picture(folder, "dpo", lambda width: dpo_curves(dpo, width), caption, caption))
    if rounds:
        best = max(range(len(rounds)), key=lambda number: (rounds[number]["dev"]["score"], -number))
        scores = ", ".join(f"{one['dev']['score']:.1f}" for one in rounds)
        caption = f"Rounds: {scores} on held-out questions, starting with the SFT model; round {best} scores highest."
        section.pictures.append(picture(folder, "rounds", lambda width: round_curves(rounds, width), caption, caption))
    missing = [
        what for what, there in (
            ("no trainer log of an SFT model (scripts/05_sft.sh)", sft),
            ("no trainer log of a DPO model (scripts/08_dpo.sh)", dpo),
            ("no rounds (scripts/iterate.sh)", rounds),
        ) if not there
    ]
    section.missing = f"{'; '.join(missing)}." if missing else ""
    return section
