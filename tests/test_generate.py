"""`stepdistill generate` draws what plain Diffusers draws with the folder, for every family; its options work."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import FAMILIES, SIDE, awake, backbone, pipeline

from stepdistill.cli import main as cli
from stepdistill.core.errors import ConfigError, StudentError
from stepdistill.core.solvers import Sampler
from stepdistill.data import Prompts, TeacherSamples
from stepdistill.families.prompt_limits import lost, warn_of_cut
from stepdistill.methods.boot import Boot
from stepdistill.methods.consistency import Consistency
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.regression import Regression
from stepdistill.methods.rollout import Lengths
from stepdistill.networks.pipeline_loras import fuse_loras
from stepdistill.networks.roles import Lora, LoraSpec
from stepdistill.students.contract import CONTRACT, WEIGHTS
from stepdistill.students.draw.call import PipelineCall, student_calls
from stepdistill.students.draw.options import changed_sampler
from stepdistill.students.draw.pipeline import DrawOptions, StudentPipeline
from stepdistill.students.write import write_student
from stepdistill.training.distill import distill
from stepdistill.training.recipe import Run, TrainSpec

NOISY, QUIET = Consistency(num_ddim_timesteps=40, ema_decay=None), Regression(num_inference_steps=2, ema_decay=None)

# what a user writes who has never heard of us
PLAIN = """
import json, sys
import numpy as np
import torch
import diffusers

torch.set_num_threads(1)
for folder, out in zip(sys.argv[1::2], sys.argv[2::2]):
    contract = json.load(open(folder + "/distill_config.json"))
    pipe = diffusers.DiffusionPipeline.from_pretrained(contract["base_model"])
    pipe.load_lora_weights(folder)
    kind = getattr(diffusers, contract["scheduler"]["_class_name"])
    pipe.scheduler = kind.from_pretrained(folder, subfolder="scheduler")
    made = pipe(prompt="red apple", generator=torch.manual_seed(3), output_type="np", **contract["call"])[0][0]
    np.save(out, made)
assert "stepdistill" not in sys.modules
"""


def folder_of(name: str, place: Path, method, alpha: float = 6) -> Path:
    """A student of a family, of rank 2, whose LoRA matters."""
    if not (place / "teacher").exists():
        pipeline(name).save_pretrained(place / "teacher")
    family = replace(FAMILIES[name], pretrained_teacher_model=str(place / "teacher"))
    pipe = family.load()
    bone = backbone(name, pipe, 2, alpha)
    bone.add("student", Lora())
    awake(bone, "student", 0.2)
    out = place / type(method).__name__
    options = {"role": "student", "resolution": (SIDE, SIDE), "method": method}
    write_student(out, family=family, pipe=pipe, backbone=bone, **options)
    return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A student of every family that noises again between its steps."""
    return {name: folder_of(name, tmp_path_factory.mktemp(name), NOISY) for name in FAMILIES}


@pytest.fixture(scope="module")
def quiet(tmp_path_factory) -> Path:
    return folder_of("sd", tmp_path_factory.mktemp("quiet"), QUIET)


def draw(
    drawer: StudentPipeline, prompts=("red apple",), seeds=(3,), options: DrawOptions | None = None, batch: int = 4
) -> np.ndarray:
    """Images (N, H, W, 3) in [0, 1], not rounded to grey levels."""
    call = drawer.call(options or DrawOptions()).plus(output_type="np")
    return np.stack([drawn.image for drawn in drawer.draw(prompts, seeds, call, batch)])


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


@pytest.mark.slow
def test_plain_diffusers_draws_the_same_pixels(folders, tmp_path):
    """Without a line of ours, every family that Diffusers can load LoRAs for."""
    plain = {name: folder for name, folder in folders.items() if FAMILIES[name].loads_lora}
    assert len(plain) == 11
    files = [part for name, folder in plain.items() for part in (str(folder), str(tmp_path / f"{name}.npy"))]
    subprocess.run([sys.executable, "-c", PLAIN, *files], check=True, capture_output=True)
    for name, folder in plain.items():
        theirs = np.load(tmp_path / f"{name}.npy")
        drawer = StudentPipeline.load(folder)
        assert apart(draw(drawer)[0], theirs) <= 1e-4, name
        assert apart(draw(StudentPipeline.load(folder, strength=0.0))[0], theirs) > 1e-2, name  # the LoRA matters
        assert apart(draw(drawer, seeds=(4,))[0], theirs) > 1e-2, name


@pytest.mark.parametrize("name", FAMILIES)
def test_a_image_depends_on_its_own_seed_alone(folders, name):
    drawer = StudentPipeline.load(folders[name])
    prompts, seeds = ("rose", "red apple", "octopus"), (8, 3, 3)
    together, alone = draw(drawer, prompts, seeds, batch=3), draw(drawer)
    assert apart(together[1], alone[0]) < 1e-4
    assert apart(draw(drawer, prompts, seeds, batch=2), together) < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_fused_is_the_same_image_and_strength_is_strength(folders, name):
    family, folder = FAMILIES[name], folders[name]
    whole, half = draw(StudentPipeline.load(folder)), draw(StudentPipeline.load(folder, strength=0.5))
    assert apart(draw(StudentPipeline.load(folder, fuse=True)), whole) < 1e-4
    assert apart(draw(StudentPipeline.load(folder, strength=0.5, fuse=True)), half) < 1e-4
    assert apart(whole, half) > 1e-3
    assert apart(draw(StudentPipeline.load(folder, strength=1.0)), whole) == 0
    if family.loads_lora:
        drawer = StudentPipeline.load(folder)
        fuse_loras(drawer.pipe)
        drawer.pipe.unfuse_lora()
        assert apart(draw(drawer), whole) < 1e-5


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.loads_lora])
def test_two_loras_are_the_sum_of_their_updates(folders, tmp_path, name):
    """The student twice, at 0.25 and 0.75, is the student; another at a strength is its own LoRA scaled."""
    folder = folders[name]
    both = StudentPipeline.load(folder, strength=0.25, loras=[(str(folder), 0.75)])
    assert apart(draw(both), draw(StudentPipeline.load(folder))) < 1e-4
    off = StudentPipeline.load(folder, loras=[(str(folder), 0.0)])
    assert apart(draw(off), draw(StudentPipeline.load(folder))) < 1e-5


def test_a_further_lora_without_a_loader_or_that_is_none_is_refused(folders, tmp_path):
    with pytest.raises(StudentError, match="Diffusers has no LoRA loader for it"):
        StudentPipeline.load(folders["pixart_sigma"], loras=[(str(folders["pixart_sigma"]), 1.0)])
    with pytest.raises(
        StudentError, match="keys unmatched, 0 matched, expected keys of a LoRA for a StableDiffusionPipeline"
    ):
        StudentPipeline.load(folders["sd"], loras=[(str(folders["sd3"]), 1.0)])
    with pytest.raises(StudentError, match="unreadable .*nowhere.*, expected a complete .safetensors file"):
        StudentPipeline.load(folders["sd"], loras=[(str(tmp_path / "nowhere.safetensors"), 1.0)])


def visited(drawer: StudentPipeline, options: DrawOptions) -> tuple[list[float], int]:
    """The times that the network is told, and the rows of its last call."""
    seen, net = [], drawer.family.network(drawer.pipe)

    def before(module, args, kwargs):
        seen.append((args or (kwargs["hidden_states"],))[0].shape[0])
        times.append(float((args[1] if len(args) > 1 else kwargs["timestep"]).flatten()[0]))

    times: list[float] = []
    handle = net.register_forward_pre_hook(before, with_kwargs=True)
    list(drawer.draw(["rose"], [0], drawer.call(options)))
    handle.remove()
    return [drawer.family.time(net, t) for t in times], seen[-1]


def test_other_steps_times_and_guidance_are_those_asked_for_and_warned_of(folders, quiet, caplog):
    drawer = StudentPipeline.load(quiet)
    own = visited(drawer, DrawOptions())
    assert own == ([999, 499], 1)
    assert not [record for record in caplog.records if record.name.startswith("stepdistill")]
    assert visited(drawer, DrawOptions(steps=4)) == ([999, 749, 499, 249], 1)
    assert "sampling at timesteps [999.0, 749.0, 499.0, 249.0]" in caplog.text
    assert visited(drawer, DrawOptions(timesteps=(999, 300, 20))) == ([999, 300, 20], 1)
    noise = drawer.family.schedule(drawer.native)(torch.tensor([999.0, 300.0]))[1].tolist()
    assert visited(drawer, DrawOptions(sigmas=tuple(noise)))[0] == [999, 300]
    assert visited(drawer, DrawOptions(guidance_scale=3.0)) == ([999, 499], 2)
    assert visited(drawer, DrawOptions(steps=1, guidance_scale=3.0)) == ([999], 2)
    assert visited(drawer, DrawOptions()) == own  # nothing stays of what was asked before
    flow = StudentPipeline.load(folders["sd3"])
    assert visited(flow, DrawOptions(sigmas=(1.0, 0.25)))[0] == pytest.approx([1000, 250])


def test_no_warning_for_a_number_of_steps_that_was_trained_beside_the_contract_s(tmp_path, caplog):
    method = DMD2(timesteps=(799.0,), lengths=Lengths(steps=(1, 2, 4), spacing="even"), eta=0, ema_decay=None)
    folder = folder_of("sd", tmp_path, method)
    drawer = StudentPipeline.load(folder)
    for steps in (None, 1, 2, 4):
        drawer.call(DrawOptions(steps=steps))
    assert not [record for record in caplog.records if record.name.startswith("stepdistill")]
    for told in (DrawOptions(steps=3), DrawOptions(steps=2, eta=1.0), DrawOptions(timesteps=(799.0, 300.0))):
        caplog.clear()
        drawer.call(told)
        assert "but the student's contract has [799.0] with eta 0" in caplog.text
    contract = json.loads((folder / CONTRACT).read_text())
    contract["method"] = {"type": "not.installed.Method"}
    (folder / CONTRACT).write_text(json.dumps(contract))
    caplog.clear()
    StudentPipeline.load(folder).call(DrawOptions(eta=1.0))
    assert "but the student's contract has [799.0] with eta 0" in caplog.text


def test_another_eta_is_another_sampler(quiet):
    drawer = StudentPipeline.load(quiet)
    plain, noisy = draw(drawer), draw(drawer, options=DrawOptions(eta=1.0))
    assert apart(plain, noisy) > 1e-3
    assert type(drawer.call(DrawOptions(eta=1.0)).scheduler).__name__ == "LCMScheduler"
    assert apart(draw(drawer, options=DrawOptions(eta=0.0)), plain) < 1e-5
    contract = drawer.contract
    assert contract is not None
    sampler = changed_sampler(contract, drawer.family.schedule(drawer.native), DrawOptions(eta=0.5, timesteps=(999.0,)))
    assert sampler == Sampler((999.0,), eta=0.5, clean=contract.clean)


def test_another_size_is_drawn(quiet):
    drawer = StudentPipeline.load(quiet)
    assert draw(drawer, options=DrawOptions(height=16, width=48)).shape == (1, 16, 48, 3)
    for size in ({"height": 36}, {"width": 20}):
        with pytest.raises(ConfigError, match="expected sides that are multiples of 8"):
            drawer.call(DrawOptions(**size))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (DrawOptions(timesteps=(20, 999)), "expected descending timesteps"),
        (DrawOptions(sigmas=(1.5,)), "expected noise levels above 0 and at most 1"),
        (DrawOptions(guidance_scale=0.5), r"guidance_scale is 0.5: expected 1 \(no guidance\) or more"),
        (DrawOptions(timesteps=(2000,)), "2000"),
    ],
)
def test_what_is_no_sampler_is_refused(quiet, options, said):
    with pytest.raises(StudentError, match=said):
        StudentPipeline.load(quiet).call(options)


def test_the_command_writes_images_that_the_drawer_draws(quiet, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("rose\noctopus\n")
    arguments = ["red apple", "--prompts_file", file, "--seed", 5, "--num_images_per_prompt", 2, "--batch", 4]
    sheet = tmp_path / "sheet.png"
    cli.main([*map(str, ["generate", quiet, *arguments, "-o", tmp_path / "out", "--grid", sheet, "--steps", 1])])
    prompts = ["red apple"] * 2 + ["rose"] * 2 + ["octopus"] * 2
    listed = [json.loads(line) for line in (tmp_path / "out" / "images.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["seed"]) for row in listed] == list(zip(prompts, range(5, 11), strict=True))
    drawn = draw(StudentPipeline.load(quiet), prompts, range(5, 11), DrawOptions(steps=1))
    for row, image in zip(listed, drawn, strict=True):
        stored = np.asarray(Image.open(tmp_path / "out" / row["file"])) / 255
        assert apart(stored, image) <= 0.51 / 255
    assert Image.open(sheet).width > 3 * 96
    assert "6 images, 2 calls" in capsys.readouterr().out


def test_the_command_lets_the_base_begin(quiet, tmp_path):
    def drawn(name: str, *options: object) -> np.ndarray:
        cli.main(list(map(str, ["generate", quiet, "rose", "-o", tmp_path / name, *options])))
        return np.asarray(Image.open(tmp_path / name / "00000.png"), dtype=float) / 255

    student_, base = drawn("a"), drawn("b", "--strength", 0)
    assert apart(drawn("c", "--base_steps", 0), student_) == 0
    assert apart(drawn("d", "--base_steps", 2), base) == 0
    mixed = drawn("e", "--base_steps", 1)
    assert apart(mixed, student_) > 0.01 and apart(mixed, base) > 0.01


def test_the_command_says_what_is_wrong(quiet, tmp_path, capsys):
    newer = tmp_path / "newer"
    newer.mkdir()
    contract = json.loads((quiet / CONTRACT).read_text())
    (newer / CONTRACT).write_text(json.dumps(contract | {"schema_version": 2}))
    for arguments, said in [
        ([quiet], "no prompt"),
        ([newer, "rose"], "schema version 2"),
        ([tmp_path / "nowhere", "rose"], "does not exist"),
        (["some/student", "rose"], "some/student, which is neither"),  # a hub id, and there is no network
        ([quiet, "rose", "--base", tmp_path / "none"], "which does not exist"),
    ]:
        with pytest.raises(SystemExit) as left:
            cli.main(["generate", *map(str, arguments), "-o", str(tmp_path / "out")])
        assert left.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_lora_of_another_family_is_refused(folders, tmp_path):
    for other, into in (("sd3", "sd"), ("sd", "sd3"), ("sana", "pixart_sigma"), ("flux", "sana")):
        mixed = tmp_path / f"{other}-{into}"
        mixed.mkdir()
        for part in folders[into].iterdir():
            if part.name != WEIGHTS and part.name != "samples":
                (mixed / part.name).symlink_to(part)
        (mixed / WEIGHTS).symlink_to(folders[other] / WEIGHTS)
        with pytest.raises(StudentError, match="cannot load|unreadable|keys unmatched, 0 matched"):
            StudentPipeline.load(mixed)


@pytest.mark.parametrize("name", ["sd", "sana", "pixart_sigma"])
def test_a_lora_that_lacks_layers_is_refused(folders, tmp_path, name):
    for part in folders[name].iterdir():
        (tmp_path / part.name).symlink_to(part)
    with safe_open(folders[name] / WEIGHTS, "pt") as file:
        state, facts = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    (tmp_path / WEIGHTS).unlink()
    lost = sorted(state)[0]
    save_file({key: value for key, value in state.items() if key != lost}, tmp_path / WEIGHTS, facts)
    with pytest.raises(StudentError, match="got .* with 1 of .* keys unmatched"):
        StudentPipeline.load(tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_end_of_a_long_prompt_that_is_cut_is_named(name, caplog):
    pipe, family = pipeline(name), FAMILIES[name]
    warn_of_cut(family, pipe, ["rose", "a cat"])
    assert not caplog.records
    words = ["rose"] * 30 + ["zebra"]
    warn_of_cut(family, pipe, ["rose", " ".join(words)])
    for tokenizer, limit in family.limits(pipe).items():
        (line,) = [r.getMessage() for r in caplog.records if f"tokens of {tokenizer} " in r.getMessage()]
        assert line.startswith(f"1 of 2 prompts are longer than the {limit} tokens")
        end = line.partition(" loses ")[2]
        assert "zebra" in end or name == "sd3" and tokenizer == "tokenizer_3"  # which knows no word
        # what is said to be left out changes nothing of what the network is told
    other = " ".join([*words[:-1], "lemon"])
    told, same = (family.condition(pipe, [prompt]) for prompt in (" ".join(words), other))
    assert all(torch.equal(told[key], same[key]) for key in told)


def test_what_is_lost_is_all_that_is_beyond_the_limit():
    letters = pipeline("pixart_sigma").tokenizer
    assert lost(letters, 6, "abcd") == "" == lost(letters, 6, "")
    assert lost(letters, 5, "abcd") == "d" and lost(letters, 4, "ab cd") == "cd"


def test_a_negative_prompt_goes_by_attention_or_where_there_is_guidance_by_it(quiet):
    drawer = StudentPipeline.load(quiet)
    call = drawer.call(DrawOptions()).plus(output_type="np")

    def drawn(call: PipelineCall) -> np.ndarray:
        return np.stack([image for image, _ in drawer.draw(["rose"], [0], call)])

    plain = drawn(call)
    with drawer.against("red apple", call, 0.5) as told:
        assert told == call
        other = drawn(told)
    assert apart(plain, other) > 1e-4
    assert apart(drawn(call), plain) == 0
    with drawer.against("red apple", call, 0.0) as told:
        assert apart(drawn(told), plain) == 0
    guided = drawer.call(DrawOptions(guidance_scale=3.0))
    with drawer.against("red apple", guided) as told:
        assert told == guided.plus(negative_prompt="red apple")
        list(drawer.draw(["rose", "octopus"], [0, 1], told))
    departs = pytest.raises(StudentError, match="guidance applies the negative prompt itself")
    with departs, drawer.against("a", guided, 0.5):
        pass


def test_a_teacher_that_cannot_be_downloaded_is_said_so(tmp_path, capsys):
    """The tests run without a network."""
    for command in (
        ["train", "configs/recipes/sana_dmd2_four_step.yaml", "--dry-run"],
        ["eval", "run", "some/teacher", "-o", str(tmp_path / "out")],
    ):
        with pytest.raises(SystemExit) as left:
            cli.main(command)
        said = capsys.readouterr().err
        assert left.value.code == 2 and "check the name" in said and "Traceback" not in said


def test_training_says_once_that_prompts_are_cut(tmp_path, caplog):
    pipeline("sd").save_pretrained(tmp_path / "teacher")
    long = tuple(f"{word} " * 30 for word in ("rose", "cat", "octopus"))
    distill(
        Run(
            family=replace(FAMILIES["sd"], pretrained_teacher_model=str(tmp_path / "teacher")),
            method=QUIET,
            data=TeacherSamples(
                folder=str(tmp_path / "samples"), source=Prompts(prompts=long), count=3, num_inference_steps=2
            ),
            lora=LoraSpec(rank=2, alpha=3),
            train=TrainSpec(output_dir=str(tmp_path / "out"), max_train_steps=1, train_batch_size=1, report_to="none"),
        )
    )
    assert caplog.text.count("longer than the 16 tokens of tokenizer") == 1


def test_a_student_is_called_in_the_numbers_of_steps_that_its_method_samples_in():
    """A sampler that the family has no scheduler for is an error, and no number that is left out."""
    pipe = pipeline("sd3")
    assert list(student_calls(FAMILIES["sd3"], Boot(), pipe, (4, 2, 1))) == [1]
    assert list(student_calls(FAMILIES["sd3"], Consistency(num_ddim_timesteps=4), pipe, (8, 4, 1))) == [4, 1]
    with pytest.raises(ConfigError, match="eta 0.3 for a flow student"):
        student_calls(FAMILIES["sd3"], Consistency(end="any"), pipe, (4, 1))
