"""The commands, code, names and links of README.md and notebooks/README.md are checked against the code."""

import inspect
import json
import math
import re
import shlex
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import sample
import train
from conftest import ROOT
from losses import pixel_reconstruction_loss, sphere_encoder_loss
from spherify import add_noise, angle_to_sigma, sample_noise, spherify, step_schedule
from test_sample import official  # noqa: F401

README, NOTEBOOKS, DIFFERENCES, RESULTS = ((ROOT / page).read_text() for page in (
    "README.md", *(f"notebooks/{name}.md" for name in ("README", "differences", "results"))))
LOSS, SAMPLING, LATENT_SAMPLING, USE, LOGS = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = [line.split("  #")[0].strip()
            for block in re.findall(r"```sh\n(.*?)```", README, re.S)
            for line in re.sub(r"\\\n\s*", "", block).splitlines() if not line.startswith("#")]


def arguments(program):
    """The argument lists of every README command that calls a program."""
    return [shlex.split(command)[shlex.split(command).index(program) + 1:]
            for command in COMMANDS if f" {program}" in command]


def test_there_are_two_set_up_commands_and_ci_runs_the_second():
    set_up = [command for command in COMMANDS if "requirements.txt" in command]
    assert len(set_up) == 2
    assert set_up[0].endswith("python train.py")
    assert set_up[1].endswith("python -m pytest --nbmake -n auto --maxprocesses 8 --dist worksteal")
    assert set_up[1] in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("argv", arguments("train.py"), ids=" ".join)
def test_readme_training_and_evaluation_commands_are_understood(argv, monkeypatch):
    command = next(command for command in COMMANDS if command.endswith(shlex.join(["train.py", *argv])))
    processes = math.prod(int(n) for n in re.findall(r"--(?:nnodes|nproc_per_node)=(\d+)", command))
    calls, known = [], {name for function in (train.train, train.quality)
                        for name in inspect.signature(function).parameters}

    def checked(preset, out, accumulate=1, **given):
        assert given.keys() <= known and preset.batch_size % (processes * accumulate) == 0
        calls.append(out)

    monkeypatch.setattr(train, "train", checked)
    monkeypatch.setattr(train, "evaluate", lambda path, **chosen: calls.append(path) or {})
    monkeypatch.setattr(train, "list_presets", lambda: calls.append("list"))
    monkeypatch.setattr(train, "export", lambda preset, export, count=None: calls.append("export"))
    monkeypatch.setattr(train, "read_checkpoint",
                        lambda *args: {"seed": 1, "preset": asdict(train.PRESETS["digits"])})
    assert train.main(argv) is None and len(calls) == 1


@pytest.mark.parametrize("argv", arguments("sample.py"), ids=" ".join)
def test_readme_sampling_commands_draw(argv, trained, official, tmp_path):
    files = {"ep0799.pth": official[0], "cfg.json": official[1],            # what README's commands speak of
             "50000": "5"}
    Image.new("RGB", (40, 30), "white").save(tmp_path / "a.png")
    argv = [str(tmp_path / "a.png" if word.endswith(".png") else files.get(word, word)) for word in argv]
    argv += ["--out", str(tmp_path / "out")]
    sample.main(argv if "--config" in argv else [*argv, "--checkpoint", str(trained)])  # the last counts
    word = argv[0] if argv[0] in sample.WORDS else "generate"
    assert (tmp_path / "out" / f"{word}.png").exists()


def test_fids_of_the_readme_are_those_of_results():
    """Cell by cell; of which row of the study fid a line is."""
    section = RESULTS.partition("## fid\n")[2].partition("\n## ")[0]
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:]] for cells in (
        line.split("|") for line in section.splitlines() if line.startswith("|"))}
    places = [rows[""].index(head) for head in ("FID 1", "FID 2", "FID 4", "FID 6", "rFID")]
    for label in ("SE, fixed", "SE, released", "SLE, fixed", "SLE, released"):
        line = label.replace("released", "decay")
        [cells] = re.findall(rf"^\| {re.escape(line)} \|(.*)\|$", README, re.M)
        assert [cell.strip() for cell in cells.split("|")] == [rows[label][place] for place in places]
    for label, head in (("held-out images", "FID"), ("SLE, released, 146 samples", "FID 4"),
                        ("a Gaussian per class", "FID")):
        assert f" {rows[label][rows[''].index(head)]}" in README


def test_the_lines_that_explain_loss_and_sampling_are_the_functions(model, denoiser):
    T, y = 3, torch.tensor([0, 3])
    x, e = torch.rand(2, 3, *model.image_size) * 2 - 1, sample_noise(0, 0, 2, model.latent_shape)[0]
    sigma, sigma_sub, sigma_max = torch.tensor([1.0, 4.0]), torch.tensor([0.2, 1.0]), angle_to_sigma(80.0)
    space = {"model": model, "denoiser": denoiser, "tokenizer": denoiser.tokenizer, "spherify": spherify,
             "add_noise": add_noise, "x": x, "y": y, "e": e, "T": T, "sigma": sigma, "sigma_sub": sigma_sub,
             "sigma_max": sigma_max, "distance": lambda a, b: pixel_reconstruction_loss(a, b)[0],
             "cosine": lambda a, b: torch.cosine_similarity(a.flatten(1), b.flatten(1)).mean()}
    exec(LOSS, space)
    torch.testing.assert_close(space["loss"], sphere_encoder_loss(
        model, x, y, sigma, sigma_sub, e, (1, 0, 1, 0, 1))[0])
    with torch.no_grad():
        exec(SAMPLING, space)
        torch.testing.assert_close(space["x"], sample.generate(model, y, T))
        space["sigma"] = [*(step_schedule(T, 1.0, "released") * angle_to_sigma(denoiser.alpha_max)), 0.0]
        exec(LATENT_SAMPLING, space)
        torch.testing.assert_close(space["x"].clamp(-1, 1), sample.generate_latent(denoiser, y, T))


def test_the_lines_that_pass_on_a_log_give_it_whole(tmp_path, monkeypatch):
    rows = [{"step": 10, "loss": 2.0}, {"step": 20, "loss": 1.0}]
    (tmp_path / "out" / "digits").mkdir(parents=True)
    (tmp_path / "out" / "digits" / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = []
    fake = SimpleNamespace(init=lambda project: None, log=lambda row, step: seen.append((row, step)))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.chdir(tmp_path)
    exec(LOGS, {})
    assert seen == [({"loss": 2.0}, 10), ({"loss": 1.0}, 20)]


def test_the_lines_of_python_run(monkeypatch):
    space = {}
    monkeypatch.chdir(ROOT)
    exec(USE, space)
    assert space["x"].shape == (3, 3, 16, 16) and space["walk"].shape == (9, 3, 16, 16)


def test_every_function_and_test_that_a_page_names_exists():
    functions = re.findall(r"`(\w+\.py):(\w+)`", README + DIFFERENCES)
    assert len(functions) > 40
    for file, name in functions:
        text = (ROOT / file).read_text()
        assert re.search(rf"(def|class) {name}\b", text), f"{file}: {name}"
    tests = re.findall(r"`(test_\w+)`", README + DIFFERENCES)
    assert len(tests) > 3
    for name in tests:
        assert any(f"def {name}(" in path.read_text() for path in (ROOT / "tests").glob("test_*.py")), name


@pytest.mark.parametrize("page", [
    "README.md", "notebooks/README.md", "notebooks/results.md", "notebooks/differences.md",
    *(f"notebooks/{path.name}" for path in sorted((ROOT / "notebooks").glob("*.ipynb")))])
def test_every_file_and_section_that_a_page_links_to_exists(page):
    links = re.findall(r"\]\(([^)#:]*)(?:#([\w-]+))?\)", (ROOT / page).read_text())
    assert len(links) > (6 if page.endswith("README.md") else 0) or page.startswith("notebooks/")
    for path, section in links:
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        headings = re.findall(r"^#+ (.*)", target.read_text(), re.M) if section else ()
        names = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert not section or section in names, f"{path}#{section}"


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_kept_executed_whole_and_small_and_no_cell_has_a_time_limit(path):
    assert path.stat().st_size < 1e6 and f"notebooks/{path.name}" in README and path.name in NOTEBOOKS
    notebook = json.loads(path.read_text())
    assert notebook["metadata"]["execution"]["timeout"] == -1               # nbmake's would be 300 s
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 5


def test_sections_of_notebooks_that_their_page_names_exist():
    headings = {n: [line for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "markdown"
                    for line in "".join(cell["source"]).splitlines() if line.startswith("## ")]
                for n, path in enumerate(sorted((ROOT / "notebooks").glob("*.ipynb")), 1)}
    named = 0
    for cell in re.findall(r"^\| SL?E .*?\|.*?\|(.*?)\|", NOTEBOOKS, re.M):
        for part in cell.split(";"):
            number = re.match(r"\s*(\d), ", part)
            for title in re.findall(r'"(.*?)"', part) if number else ():
                named += 1
                assert any(title in heading for heading in headings[int(number[1])]), (number[1], title)
    assert named > 15
