"""Several students: whose a prompt is, in training and afterwards; and that the router sends it to that student."""

from __future__ import annotations

import json
import math
import os
import random
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from images import encoded, noise
from oracles.context import Scripted, stable_diffusion
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stepdistill.cli import main as cli
from stepdistill.config.load import load_config
from stepdistill.core.errors import ConfigError, DataError, OutputError, StudentError
from stepdistill.core.prediction import Estimate
from stepdistill.core.random import sample_rng
from stepdistill.data import ImageFolder, Latents, Partition, Prompts, Stream, TeacherSamples, check_source, loader
from stepdistill.data import routing as router
from stepdistill.data.bundled import emoji
from stepdistill.data.routing import FORMAT, ROUTER, Routing, cluster, consecutive, normal, read_routing
from stepdistill.methods.base import Batch
from stepdistill.methods.consistency import Consistency
from stepdistill.methods.regression import Regression
from stepdistill.networks.roles import Lora, LoraSpec
from stepdistill.students import verify
from stepdistill.students.contract import CONTRACT, WEIGHTS, is_multi, read_contract, read_multi
from stepdistill.students.draw.call import PipelineCall, generate
from stepdistill.students.draw.pipeline import StudentPipeline
from stepdistill.students.load import load_student
from stepdistill.students.several import join_students
from stepdistill.students.verify import verify_student
from stepdistill.training.distill import distill
from stepdistill.training.recipe import Run, TrainSpec

ROOT = Path(__file__).parent.parent
NAMES = [f"{drawing.name} {drawing.subgroup}" for drawing in emoji.drawings()]
FEW = ("red apple", "cat face", "green apple", "dog face", "pear", "Cat  Face")  # five different ones
UNSEEN = ["a photo of a tiger", "TIGER", "", "zzz", "apple pie on a table", "\u00e9clair", "face"]


def parts(students: int, **fields) -> list[Partition]:
    fields = {"source": Prompts(prompts=tuple(NAMES))} | fields
    return [Partition(students=students, student=k, **fields) for k in range(students)]


def prompts_of(part: Partition) -> list[str]:
    return [caption for i in range(len(part)) for caption in part.captions(i)]


# the parts


@pytest.mark.parametrize("by", ["class", "cluster"])
@pytest.mark.parametrize("students", [1, 2, 3, 4, 7])
def test_parts_are_disjoint_and_complete_and_equal(by, students):
    whole = [{normal(prompt) for prompt in prompts_of(part)} for part in parts(students, by=by)]
    assert set().union(*whole) == set(map(normal, NAMES))
    sizes = [len(part) for part in whole]
    assert sum(sizes) == len(set(map(normal, NAMES))) and max(sizes) - min(sizes) <= 1


def test_every_item_is_some_student_s_once():
    source = Prompts(prompts=tuple(NAMES))
    found = [part.name(i) for part in parts(3) for i in range(len(part))]
    assert sorted(found) == sorted(source.name(i) for i in range(len(NAMES)))


def test_classes_are_consecutive():
    found = [prompts_of(part) for part in parts(3, by="class", source=Prompts(prompts=tuple("ABCDEFGH")))]
    assert found == [list("ABC"), list("DEF"), list("GH")]
    listed = {"by": "class", "classes": ("tench", "goldfish", "great white shark", "hen")}
    captions = ("a photo of a hen", "a photo of a goldfish", "a White Shark", "tench", "the great hen")
    found = [prompts_of(part) for part in parts(2, source=Prompts(prompts=captions), **listed)]
    assert found == [["a photo of a goldfish", "tench"], ["a photo of a hen", "a White Shark", "the great hen"]]


def test_clusters_have_words_in_common():
    colours, animals = ("red", "green", "blue", "pale"), ("cat", "dog", "tiger", "mouse")
    fruit = [f"{colour} {thing}" for thing in ("apple", "pear", "plum", "fig") for colour in colours]
    beasts = [f"{mood} {animal}" for animal in animals for mood in ("sad", "happy", "angry", "tired")]
    mixed = fruit + beasts
    random.shuffle(mixed)
    found = [set(prompts_of(part)) for part in parts(2, source=Prompts(prompts=tuple(mixed)))]
    assert sorted(map(sorted, found)) == sorted([sorted(fruit), sorted(beasts)])


def test_captions_decide_and_not_items(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"text": ["red apple", "cat face"]}\n{"text": "dog face"}\n')
    (tmp_path / "a.txt").write_text("red apple\n")
    (tmp_path / "b.txt").write_text("cat face\ndog face\n")
    files = {"by": "file", "files": (str(tmp_path / "a.txt"), str(tmp_path / "b.txt"))}
    first, second = parts(2, source=Prompts(prompts_file=str(tmp_path / "p.jsonl")), **files)
    draws = [[part.sample(0, sample_rng(0, n)).prompt for n in range(20)] for part in (first, second)]
    assert (len(first), len(second)) == (1, 2)
    assert set(draws[0]) == {"red apple"} and set(draws[1]) == {"cat face"}


@pytest.mark.parametrize("by", ["file", "json"])
def test_files_say_whose_a_prompt_is(tmp_path, by):
    owned = [["Red  apple", "pear", "green apple"], ["cat face", "dog face"]]
    names = []
    for k, prompts in enumerate(owned):
        names.append(str(tmp_path / f"{k}.txt"))
        Path(names[k]).write_text("\n".join(prompts))
    if by == "json":
        names = [str(tmp_path / "all.json")]
        Path(names[0]).write_text(json.dumps({prompt: k for k, prompts in enumerate(owned) for prompt in prompts}))
    found = parts(2, by="file", files=tuple(names), source=Prompts(prompts=FEW))
    assert [prompts_of(part) for part in found] == [["red apple", "green apple", "pear"], list(FEW[1::2])]
    if by == "file":  # a student's own file will do as its source
        own = replace(found[1], source=Prompts(prompts_file=names[1]))
        assert own.router == found[1].router and prompts_of(own) == owned[1]


def test_images_keep_bucket_and_size_and_their_own_draws(tmp_path):
    for i, (height, width) in enumerate([(16, 16), (8, 32), (8, 32), (16, 16)]):
        (tmp_path / f"{i}.png").write_bytes(encoded(noise(height, width, i)))
        (tmp_path / f"{i}.txt").write_text(f"{'apple' if i % 2 else 'cat'} {i}")
    source = ImageFolder(train_data_dir=str(tmp_path), resolution=16, aspect_buckets=True, bucket_step=8)
    for part in parts(2, source=source):
        for i, (j, _) in enumerate(part._items):
            assert (part.buckets()[i], part.size(i)) == (source.buckets()[j], source.size(j))
            ours, theirs = part.sample(i, sample_rng(0, 5)), source.sample(j, sample_rng(0, 5))
            assert torch.equal(ours.pixels, theirs.pixels) and (ours.prompt, ours.item) == (theirs.prompt, i)
        assert len(part) == 2 and "2 samples, 2 usable" in check_source(part)
        assert part.provides == source.provides and part.digest() != source.digest()


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_captions_are_dropped_at_the_shares_of_both(where):
    shares = {"inside": (0.3, 0.0), "outside": (0.0, 0.3)}[where]
    source = Prompts(prompts=FEW, proportion_empty_prompts=shares[0])
    part = Partition(source=source, students=1, proportion_empty_prompts=shares[1])
    for draw in (part.prompt, lambda i, rng: part.sample(i, rng).prompt):
        found = [draw(n % len(FEW), sample_rng(0, n)) for n in range(1000)]
        assert 250 < found.count("") < 350 and set(found) == {*FEW, ""}


# the router


@pytest.mark.parametrize("make", [consecutive, cluster])
def test_training_and_serving_route_alike(make, tmp_path):
    part = parts(4, by="class" if make is consecutive else "cluster")[1]
    Routing(1, part.router).save(tmp_path)
    stored = read_routing(tmp_path)
    assert (stored.student, stored.router) == (1, part.router) and part.router == make(NAMES, 4)
    own = {normal(prompt) for prompt in prompts_of(part)}
    assert own and all((stored.router.route(prompt) == 1) == (normal(prompt) in own) for prompt in NAMES)
    # another process, with other hashes of text
    code = "import sys; from pathlib import Path; from stepdistill.data.routing import read_routing as read\n"
    code += f"print([read(Path(sys.argv[1])).router.route(p) for p in {[*NAMES[::50], *UNSEEN]!r}])"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, tmp_path], env=environment, capture_output=True, text=True)
    assert json.loads(done.stdout) == [part.router.route(prompt) for prompt in [*NAMES[::50], *UNSEEN]], done.stderr


@pytest.mark.parametrize("make", [consecutive, cluster])
def test_white_space_and_case_make_no_difference(make):
    made = make(NAMES, 5)
    for prompt in [*NAMES[::7], *UNSEEN]:
        for other in (
            prompt.upper(),
            f"  {prompt}\n",
            prompt.replace(" ", "\u00a0 \t"),
            prompt.replace("\u00e9", "e\u0301"),
        ):
            assert made.route(other) == made.route(prompt), (prompt, other)
        assert 0 <= made.route(prompt) < 5
    twice = [prompt.upper() for prompt in NAMES] + [f" {prompt}" for prompt in NAMES]
    assert make(NAMES + twice, 5) == made


@pytest.mark.parametrize("seen", [router.SEEN, 50])  # also where a direction is sought in some prompts only
def test_clusters_do_not_depend_on_the_order_of_prompts(monkeypatch, seen):
    monkeypatch.setattr(router, "SEEN", seen)
    shuffled = NAMES.copy()
    random.shuffle(shuffled)
    assert cluster(shuffled, 4) == cluster(NAMES, 4)


def test_a_prompt_on_no_list_goes_to_the_nearest():
    made = consecutive(["tench", "goldfish", "great white shark", "hammerhead shark"], 2)
    assert [made.route(f"a photo of a {name}") for name in ("tench", "goldfish", "white shark")] == [0, 0, 1]
    assert {made.route(f"nothing{i}") for i in range(20)} == {0, 1}
    for names in (["red plum", "red pear"], ["red pear", "red plum"]):
        assert consecutive(names, 2).route("red") == 0  # of equally near ones the first


def test_clusters_part_prompts_without_a_common_word():
    names = [f"{a}{b}" for a in "abcdefgh" for b in "ijklmnop"]
    made = cluster(names, 3)
    assert sorted(sum(made.route(name) == k for name in names) for k in range(3)) == [21, 21, 22]


# refusals


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"students": 0}, "0 students, expected at least 1"),
        ({"students": 2, "student": 2}, "student 2 of 2, expected 0 to 1"),
        ({"students": 2, "student": -1}, "student -1 of 2"),
        ({"students": 2, "by": "file"}, "by 'file' with 0 files"),
        ({"students": 2, "files": ["a.txt", "b.txt"]}, "by 'cluster' with 2 files"),
        ({"students": 2, "classes": ["a", "b"]}, "and 2 classes"),
        ({"students": 3, "by": "file", "files": ["a.txt", "b.txt"]}, "2 files for 3 students"),
    ],
)
def test_a_config_that_cannot_be_is_refused(tmp_path, fields, said):
    source = {"type": "stepdistill.data.Prompts", "prompts": list(FEW)}
    (tmp_path / "c.yaml").write_text(
        json.dumps({"data": {"type": "stepdistill.data.Partition", "source": source} | fields})
    )
    with pytest.raises(ConfigError, match=said):
        load_config(Run, tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("texts", "fields", "said"),
    [
        ([], {"students": 6}, "5 different prompts for 6 students, expected at least 6.* no prompts"),
        ([], {"students": 6, "by": "class"}, "5 different prompts for 6"),
        ([], {"by": "class", "classes": ("a", "A ")}, "1 different classes for 2"),
        ([], {"by": "class", "classes": ("apple", "tiger", "owl", "pear")}, "'cat face' in prompt 2 .* not in"),
        ([], {"by": "class", "classes": ("apple", "pear"), "source": Prompts(prompts=("a pear",))}, "of student 0"),
        (["red apple", "RED  Apple\ncat face"], {"by": "file"}, "'red apple' for the students 0 and 1"),
        (["red apple", "\n \n"], {"by": "file"}, "student 1: got no prompt in"),
        (["red apple", "cat face"], {"by": "file"}, "'green apple' in prompt 3 .* not in"),
        (['{"red apple": 1}'], {"by": "file"}, "no prompt for student 0"),
        (['{"red apple": 2}'], {"by": "file"}, "'2' for 'red apple' in .* 0 to 1"),
        (['["red apple"]'], {"by": "file"}, "an object of prompts"),
        (["{"], {"by": "file"}, "does not parse"),
    ],
)  # fmt: skip
def test_a_student_without_prompts_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, texts, fields, said):
    suffix = "json" if len(texts) == 1 else "txt"
    for k, text in enumerate(texts):
        (tmp_path / f"{k}.{suffix}").write_text(text)
    files = tuple(str(tmp_path / f"{k}.{suffix}") for k in range(len(texts)))
    data = Partition(**{"source": Prompts(prompts=FEW), "students": 2, "files": files} | fields)
    family = replace(tiny.FAMILIES["sd3"])
    monkeypatch.setattr(type(family), "load", lambda self: pytest.fail("the teacher was loaded"))
    method, spec = Regression(), TrainSpec(output_dir=str(tmp_path / "out"))
    samples = TeacherSamples(source=data, folder=str(tmp_path / "samples"))
    with pytest.raises(DataError, match=said):
        distill(Run(family=family, method=method, data=samples, train=spec))
    assert not (tmp_path / "out").exists()


# training, joining, drawing


PROMPTS = ("red apple", "green apple", "cat face", "dog face")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two trained students of one teacher, in `0` and `1`, whose LoRAs are far from zero and from one another."""
    place = tmp_path_factory.mktemp("runs")
    tiny.pipeline("sd3").save_pretrained(place / "teacher")
    for k in range(2):
        torch.manual_seed(k)
        samples = TeacherSamples(
            source=Prompts(prompts=PROMPTS), folder=str(place / "samples"), count=8, num_inference_steps=2
        )
        distill(
            Run(
                family=replace(tiny.FAMILIES["sd3"], pretrained_teacher_model=str(place / "teacher")),
                method=Consistency(ema_decay=None, end="any", eta=0.0, num_inference_steps=2 + k),
                data=Partition(source=samples, students=2, student=k),
                lora=LoraSpec(rank=2, alpha=6),
                train=TrainSpec(
                    output_dir=str(place / str(k)),
                    seed=k,
                    max_train_steps=3,
                    train_batch_size=2,
                    learning_rate=3e-2,
                    report_to="none",
                ),
            )
        )
    return place


@pytest.fixture(scope="module")
def joined(runs) -> Path:
    return join_students(runs / "all", [runs / "1", runs / "0"])


def family(runs: Path):
    return replace(tiny.FAMILIES["sd3"], pretrained_teacher_model=str(runs / "teacher"))


def drawn(pipe, call, prompts, places) -> Tensor:
    """Final latents, image i from a noise and a generator of its own."""
    noises = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in places])
    generators = [torch.Generator().manual_seed(100 + i) for i in places]
    made = pipe(prompts, latents=noises, generator=generators, output_type="latent", **call)
    return made if isinstance(made, Tensor) else made.images


def test_runs_share_one_folder_of_samples_and_write_their_router(runs):
    assert len(list((runs / "samples").glob("chunk-*"))) == 1
    samples = TeacherSamples(source=Prompts(prompts=PROMPTS), folder=str(runs / "not yet"), count=8)
    assert "4 samples, 4 usable" in check_source(Partition(source=samples, students=2))  # reads no latents
    routings = [read_routing(runs / str(k)) for k in range(2)]
    assert [routing.student for routing in routings] == [0, 1] and routings[0].router == routings[1].router
    assert {routings[0].router.route(prompt) for prompt in PROMPTS} == {0, 1}


def test_the_router_sends_each_prompt_to_its_student(runs, joined):
    prompts = ["cat face", "RED  apple", "dog face", "green apple", "red apple", "a photo of a dog", "zzz"]
    route = read_routing(joined).router.route
    ours = family(runs).load()
    students = load_student(ours, joined)
    made = drawn(students, {}, prompts, range(len(prompts)))
    numbers, alone = [route(prompt) for prompt in prompts], []
    for k in range(2):
        pipe = family(runs).load()
        call = load_student(pipe, runs / str(k))
        alone.append(torch.cat([drawn(pipe, call, [prompts[i]], [i]) for i in range(len(prompts))]))
    assert set(numbers) == {0, 1}
    for i, k in enumerate(numbers):
        scale = alone[k][i].abs().max()
        assert (made[i] - alone[k][i]).abs().max() < 1e-4 * scale
        assert (made[i] - alone[1 - k][i]).abs().max() > 1e-2 * scale

    order = [4, 0, 6, 2, 5, 1, 3]
    again = drawn(students, {}, [prompts[i] for i in order], order)
    assert (again - made[order]).abs().max() < 1e-4 * made.abs().max()
    few = drawn(students, {}, [prompts[i] for i in order[:3]], order[:3])
    assert (few - made[order[:3]]).abs().max() < 1e-4 * made.abs().max()


def test_generators_are_shared_out_with_the_prompts(runs, joined):
    students = load_student(family(runs).load(), joined)
    prompts = ["cat face", "red apple", "dog face"]

    def noises(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    made = students(prompts, generator=noises(0, 1, 2), output_type="latent")
    for i, prompt in enumerate(prompts):
        alone = students([prompt], generator=noises(i), output_type="latent")[0]
        assert (made[i] - alone).abs().max() < 1e-4 * alone.abs().max()


def test_images_come_in_the_form_that_is_asked_for(runs, joined):
    students = load_student(family(runs).load(), joined)
    students.pipe.set_progress_bar_config(disable=True)
    images = students(["cat face", "red apple"], generator=[torch.manual_seed(0), torch.manual_seed(1)])
    assert [image.size for image in images] == [(32, 32)] * 2 and isinstance(images[0], Image.Image)
    assert students("red apple", output_type="np").shape == (1, 32, 32, 3)
    assert students(PROMPTS, output_type="pt", height=16, width=16).shape == (4, 3, 16, 16)
    with pytest.raises(ValueError, match="got 1 generator, expected one for each of 2 prompts"):
        students(["cat face", "red apple"], generator=[torch.manual_seed(0)])
    with pytest.raises(ValueError, match="no prompts"):
        students([])
    with pytest.raises(ValueError, match="4 images of 2 prompts"):
        students(PROMPTS, num_images_per_prompt=2, output_type="pt")


def test_a_style_and_the_pipeline_itself_are_left_as_they_were(runs, joined, tmp_path):
    pipe = family(runs).load()
    bone = tiny.backbone("sd3", family(runs).load())
    bone.add("style", Lora())
    tiny.awake(bone, "style", 0.05)
    family(runs).save_lora(tmp_path, bone.state("style"), bone.lora_config("style"))
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    students = load_student(pipe, joined)
    made = drawn(students, {}, list(PROMPTS), range(4))

    k = students.router.route(PROMPTS[2])
    plain = family(runs).load()
    plain.load_lora_weights(tmp_path, adapter_name="style")
    call = load_student(plain, runs / str(k))
    alone = drawn(plain, call, [PROMPTS[2]], [2])[0]
    assert (made[2] - alone).abs().max() < 1e-4 * alone.abs().max()
    bare = drawn(load_student(family(runs).load(), joined), {}, list(PROMPTS), range(4))
    assert (made - bare).abs().max() > 1e-3 * bare.abs().max()
    with students.use(1):
        assert pipe.transformer.active_adapters() == ["style", "student-1"]
        assert pipe.scheduler is students.schedulers[1]
    assert pipe.transformer.active_adapters() == ["style", "student-0"] and pipe.scheduler is students.schedulers[0]


def test_the_folder_is_whole(runs, joined):
    contract = read_multi(joined)
    assert is_multi(joined) and not is_multi(runs / "0") and contract.students == 2
    assert contract.base_hash == read_contract(runs / "0").base_hash
    assert read_routing(joined).student is None
    for k in range(2):  # each with its own proof, and without what only training needs
        copy = joined / "students" / str(k)
        assert read_contract(copy) == read_contract(runs / str(k)) and read_contract(copy).proof
        assert (runs / str(k) / "checkpoint-3").exists() and not (copy / "checkpoint-3").exists()
        assert str(copy) in (copy / "README.md").read_text()
    assert verify_student(joined) < 1e-4
    with pytest.raises(StudentError, match="kind: Input should be 'lora', 'full' or 'adapters'"):
        read_contract(joined)


@pytest.mark.parametrize("k", [0, 1])
def test_verify_looks_at_every_student(joined, tmp_path, k):
    folder = shutil.copytree(joined, tmp_path / "copy")
    weights = folder / "students" / str(k) / WEIGHTS
    save_file(load_file(weights), weights)  # its metadata are lost, and with them alpha
    assert verify_student(folder) > 1e-2


def test_the_snippet_runs_as_pasted(joined, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (joined / "README.md").read_text()
    assert "| [0](students/0/README.md) | 2 |" in text and (joined / "students" / "0" / "README.md").exists()
    exec(text.partition("```python\n")[2].partition("```")[0], {})
    assert {path.name for path in tmp_path.glob("*.png")} == {"red apple.png", "cat face.png"}


def test_the_script_draws_what_each_student_draws_alone(runs, joined, tmp_path, monkeypatch, capsys):
    prompts = ["cat face", "red apple", "dog face"]
    several = StudentPipeline.of(family(runs), joined)
    students = several.loaded
    images, cost = several.generate(several.calls(), prompts, 3)
    calls = 0
    for k in range(2):
        pipe = family(runs).load()
        call = load_student(pipe, runs / str(k))
        alone, one = generate(pipe, PipelineCall("one", pipe.scheduler, call, family(runs)), prompts, 3)
        calls += one.calls
        own = [i for i, prompt in enumerate(prompts) if students.router.route(prompt) == k]
        assert own and (images[own].int() - alone[own].int()).abs().max() <= 1
    assert cost.calls == calls == 5
    argv = ["generate.py", str(joined), *prompts, "--seed", "3", "-o", str(tmp_path / "drawn")]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(str(ROOT / "sample" / "generate.py"), run_name="__main__")
    assert "5 calls" in capsys.readouterr().out
    drawn = [np.asarray(Image.open(tmp_path / "drawn" / f"{n:05d}.png")) for n in range(3)]
    again = load_student(family(runs).load(), joined)
    generators = [torch.Generator().manual_seed(3 + n) for n in range(3)]
    assert all(np.array_equal(a, b) for a, b in zip(drawn, again(prompts, generator=generators), strict=True))


def changed(folder: Path, to: Path, **fields) -> Path:
    """A copy whose contract says something else."""
    shutil.copytree(folder, to)
    contract = json.loads((to / CONTRACT).read_text())
    (to / CONTRACT).write_text(json.dumps(contract | fields))
    return to


def test_what_does_not_belong_together_is_not_joined(runs, joined, tmp_path):
    one, other = runs / "0", runs / "1"
    hashes = dict.fromkeys(read_contract(other).base_hash, "0")
    arguments = read_contract(other).family | {"max_sequence_length": 77}
    unrouted = changed(other, tmp_path / "unrouted")
    (unrouted / ROUTER).unlink()
    elsewhere = changed(other, tmp_path / "elsewhere")
    Routing(1, consecutive(PROMPTS, 2)).save(elsewhere)
    third = changed(other, tmp_path / "third")
    Routing(2, cluster(PROMPTS, 3)).save(third)
    for folders, said in [
        ([], "no folder"),
        ([one], r"1 of 2 students, without \[1\]"),
        ([one, one], "student 0 both in"),
        ([one, changed(other, tmp_path / "hash", base_hash=hashes)], "differ in the weights of the base"),
        ([one, changed(other, tmp_path / "arguments", family=arguments)], "differ in the family's arguments"),
        ([one, changed(other, tmp_path / "unproven", proof=None)], "no proof of"),
        ([one, unrouted], "trained on stepdistill.data.Partition"),
        ([one, elsewhere], "differ in the router"),
        ([one, third], "differ in the number of students, the router"),
        ([joined], "a folder of several students"),
        ([one, tmp_path / "nowhere"], "no readable"),
    ]:
        with pytest.raises(StudentError, match=said):
            join_students(tmp_path / "out", folders)
        assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match="add --overwrite"):
        join_students(joined, [one, other])
    with pytest.raises(OutputError, match="which is an input"):
        join_students(one, [one, other], overwrite=True)


def test_the_command_joins(runs, tmp_path, capsys):
    folders = [shutil.copytree(runs / str(k), tmp_path / str(k)) for k in range(2)]
    cli.main(["multi", str(tmp_path / "all"), *map(str, folders), "--move"])
    assert "joined 2 students" in capsys.readouterr().out
    assert not folders[0].exists() and (tmp_path / "all" / "students" / "0" / "checkpoint-3").exists()
    with pytest.raises(SystemExit) as ended:
        cli.main(["multi", str(tmp_path / "more"), str(tmp_path / "all")])
    assert ended.value.code == 2 and "several students" in capsys.readouterr().err


def test_a_router_of_another_number_of_students_is_refused(runs, joined, tmp_path):
    folder = shutil.copytree(joined, tmp_path / "copy")
    Routing(None, cluster(PROMPTS, 3)).save(folder)
    with pytest.raises(StudentError, match="a router of 3 and a contract of 2 students"):
        load_student(family(runs).load(), folder)
    (folder / ROUTER).write_bytes(FORMAT.dump_json(Routing(None, cluster(PROMPTS, 2))).replace(b'"tree"', b'"cake"'))
    with pytest.raises(StudentError, match="no readable"):
        load_student(family(runs).load(), folder)


# the closed form


def bias(part: Partition) -> tuple[float, float]:
    """The bias that a student of nothing else converges to on its part, and what is left of the loss."""
    count = len(part)
    stream = Stream(part, count, seed=0)
    samples = next(loader(stream, 0, [range(count)], 0, seed=0))
    latents = torch.stack([sample.latents for sample in samples if sample.latents is not None]).double()
    value = torch.zeros((), dtype=torch.float64, requires_grad=True)
    context = Scripted(
        schedule=stable_diffusion(),
        null={},
        denoiser=lambda role: lambda x_t, t, cond: Estimate(value + 0 * x_t, x_t),
        module=nn.ModuleDict().__getitem__,
        decode=nn.Identity(),
        seed=0,
        step=0,
        device=torch.device("cpu"),
        draws={},
        eps=torch.zeros(0),
    )
    batch = Batch(tuple(range(count)), {}, (1, 1, 1), latents, torch.zeros_like(latents))

    def loss() -> Tensor:
        (update,) = Regression(num_inference_steps=1).updates(context, batch, 0)
        return update.loss

    (slope,) = torch.autograd.grad(loss(), value, create_graph=True)
    (curve,) = torch.autograd.grad(slope, value)
    with torch.no_grad():
        value -= slope / curve  # exact: the loss is a parabola
    return value.item(), loss().item()


@pytest.mark.parametrize("by", ["class", "cluster"])
def test_a_bias_learns_the_mean_of_its_part_and_more_students_leave_less(tmp_path, by):
    """Oracle: b_k is the mean of m_c over the part, what is left the variance within, which falls with K."""
    names = [f"{family} {i}" for family in ("apple", "cat", "ship", "star") for i in range(4)]
    means = {name: float(i // 4) + 0.1 * i for i, name in enumerate(names)}
    save_file({"latents": torch.tensor(list(means.values())).reshape(-1, 1, 1, 1)}, tmp_path / "latents.safetensors")
    (tmp_path / "prompts.txt").write_text("\n".join(names) + "\n")
    left = []
    for students in (1, 2, 4, 8, 16):
        found = parts(students, source=Latents(folder=str(tmp_path)), by=by)
        biases = [bias(part) for part in found]
        for part, (value, residual) in zip(found, biases, strict=True):
            values = np.array([means[prompt] for prompt in prompts_of(part)], dtype=np.float32).astype(float)
            assert value == pytest.approx(values.mean(), rel=1e-12) and residual == pytest.approx(
                values.var(), abs=1e-12
            )
        # served: each prompt is drawn by the student that the router sends it to
        route = found[0].router.route
        served = np.mean([(biases[route(name)][0] - means[name]) ** 2 for name in names])
        assert served == pytest.approx(np.mean([residual for _, residual in biases]), abs=1e-6)
        left.append(served)
    assert all(more < less for less, more in zip(left[:-1], left[1:], strict=True)) and left[-1] < 1e-12


def test_a_student_that_draws_nothing_is_not_passed_over(joined, tmp_path, monkeypatch):
    """`max` of 0.1 and nan is 0.1."""
    differences = iter([1e-6, math.nan])
    monkeypatch.setattr(verify, "prove", lambda *_: SimpleNamespace(difference=next(differences)))
    assert math.isnan(verify_student(joined))
    differences = iter([1e-6, math.nan])
    assert math.isnan(verify.verify_formats(joined)["diffusers"])
