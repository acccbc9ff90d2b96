"""The pages about methods: one for each, made from its docstring and recipes; the index of papers; the recipes."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path
from textwrap import indent
from typing import NamedTuple

from reference_pages import section, shipped

from stepdistill.config.schema import dotted, fields, structures
from stepdistill.core.schedule import Rectified
from stepdistill.decoding.method import DistilledDecoding
from stepdistill.decoding.run import DecodingRun, read_run
from stepdistill.methods.base import Method, Tuning
from stepdistill.training.recipe import Run

ROOT = Path(__file__).parent.parent.parent
SENTENCE = r"(?<=\.) (?<!et al\. )"
PLACES = 576  # tokens of an image of Janus-Pro
PAPER = re.compile(r"https://arxiv\.org/abs/[\d.]*\d")


class Paper(NamedTuple):
    """A reference of a docstring, and the settings in it: a code span such as `end: clean`."""

    url: str
    text: str
    settings: str

    @property
    def title(self) -> str:
        """The first sentence, without the settings."""
        return re.sub(r":? `[a-z_]+: .*", ".", re.split(SENTENCE, self.text)[0])


class Recipe(NamedTuple):
    """A file of configs/recipes: its first line's command, what the rest of the header says, and its commented keys."""

    file: Path
    command: str
    about: str
    numbers: list[tuple[str, str, str]]
    run: Run | DecodingRun

    @property
    def steps(self) -> str:
        """How many; a tuned student has those of the one that it starts from."""
        if isinstance(self.run, DecodingRun):
            return f"1 to {len(self.run.method.trained_keeps(PLACES))}"
        if isinstance(self.run.method, Tuning) and self.run.method.sampling is None:
            return "its start's"
        return str(len(self.run.method.sampler(Rectified()).timesteps))

    @property
    def teacher(self) -> str:
        """The class of its family, or of a teacher that has none."""
        return type(self.run.teacher if isinstance(self.run, DecodingRun) else self.run.family).__name__


def pages() -> dict[str, str]:
    """Markdown by path below docs/."""
    methods, recipes = all_methods(), read_recipes()
    made = {page_of(cls): _method(cls, [r for r in recipes if cls in used(r.run.method)]) for cls in methods}
    return made | {"methods/papers.md": _papers(methods, recipes), "methods/recipes.md": _recipes(recipes)}


def all_methods() -> list[type]:
    """The classes with a page of their own."""
    return [*shipped(Method), DistilledDecoding]


def module_of(cls: type) -> str:
    """A method's name: its module's, or that of a room which has one method."""
    return cls.__module__.removesuffix(".method").rpartition(".")[2]


def page_of(cls: type) -> str:
    return f"methods/{module_of(cls)}.md"


def used(method: Method | DistilledDecoding) -> list[type]:
    """The class of a method and of each method in it."""
    inside = [cls for part in vars(method).values() if isinstance(part, Method) for cls in used(part)]
    return [type(method), *inside]


def options(cls: type) -> list[type]:
    """A method's class and those of its own groups of options."""
    parts = [part for hint in fields(cls).values() for part in structures(hint) if not issubclass(part, Method)]
    return [cls, *dict.fromkeys(parts)]


def sections(doc: str | None) -> dict[str, str]:
    """A docstring by section; the text before the first one is under ""."""
    parts = re.split(r"^(\w+):\n(?=    )", inspect.cleandoc(doc or ""), flags=re.M)
    return {"": parts[0].strip()} | {
        name: inspect.cleandoc(text) for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def papers(cls: type) -> list[Paper]:
    """The references of a class's docstring, one a sentence that has a link; what follows it belongs to it."""
    text = " ".join(sections(cls.__doc__).get("References", "").split())
    found: list[Paper] = []
    for sentence in re.split(SENTENCE, text):
        if url := PAPER.search(sentence):
            settings = re.search(r"`([a-z_]+: [^`]+)`", sentence)
            found.append(Paper(url[0], sentence, settings[1] if settings else ""))
        elif found:
            found[-1] = found[-1]._replace(text=f"{found[-1].text} {sentence}")
    return found


def read_recipes() -> list[Recipe]:
    return [_recipe(file) for file in sorted((ROOT / "configs/recipes").glob("*.yaml"))]


def _recipe(file: Path) -> Recipe:
    lines = file.read_text().splitlines()
    count = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    head = [line.removeprefix("#").removeprefix(" ") for line in lines[:count]]
    numbers, path = [], []
    for line in lines[count:]:
        if key := re.match(r"( *)([\w.]+): *(.*?)(?: +# (.*))?$", line):
            path = [*path[: len(key[1]) // 2], key[2]]
            if key[4]:
                numbers.append((".".join(path), key[3], key[4]))
    return Recipe(file, head[0], "\n".join(head[1:]), numbers, read_run(file))


def _method(cls: type, recipes: list[Recipe]) -> str:
    doc, module, name = sections(cls.__doc__), sys.modules[cls.__module__], module_of(cls)
    init = f"stepdistill init {name}" + " sd" * issubclass(cls, Method)
    file = f"{cls.__module__.replace('.', '/')}.py"
    body = [f"# {cls.__name__}", doc[""], f"`{dotted(cls)}`{{ .path }}", module.__doc__ or ""]
    if "Equation" in doc:
        body += ["## Equation", f"```{{ .text .equation }}\n{doc['Equation']}\n```"]
    body += ["## Papers", *(f"- {paper.text}" for part in options(cls) for paper in papers(part))]
    body += ["", "## Config", f"The `method` section as `{init}` prints it:"]
    body += [section("method", cls, typed=issubclass(cls, Method))]
    body += ["Train with it:"]
    command = f"{init} > mine.yaml\naccelerate launch -m stepdistill train mine.yaml"
    body += [f"```bash\n{command}\n```", "## Recipes"]
    if not recipes:
        body += ["There is no recipe for this method yet; start from the config above."]
    for recipe in recipes:
        body += [f"[`{_name(recipe)}`](recipes.md#{recipe.file.stem}): {recipe.steps} steps", _table(recipe.numbers)]
    source = indent(_fenced((ROOT / file).read_text(), "python"), "    ")
    body += ["## Source", f'??? example "`{file}`"\n\n{source}']
    return "\n\n".join(part.strip() for part in body) + "\n"


def _fenced(text: str, language: str) -> str:
    return f"```{language}\n{text.strip()}\n```"


def _name(recipe: Recipe) -> str:
    return f"configs/recipes/{recipe.file.name}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _table(numbers: list[tuple[str, str, str]]) -> str:
    rows = [f"| `{key}` | {f'`{_cell(value)}`' if value else ''} | {_cell(why)} |" for key, value, why in numbers]
    return "\n".join(["| key | value | the recipe's comment |", "| --- | --- | --- |", *rows])


def _papers(methods: list[type], recipes: list[Recipe]) -> str:
    lines = ["| paper | method | settings | recipes |", "| --- | --- | --- | --- |"]
    cited = {cls: [paper for part in options(cls) for paper in papers(part)] for cls in methods}
    for url in dict.fromkeys(paper.url for found in cited.values() for paper in found):
        text = next(paper.title for found in cited.values() for paper in found if paper.url == url)
        users = {cls: paper.settings for cls, found in cited.items() for paper in found if paper.url == url}
        links = ", ".join(f"[{cls.__name__}]({Path(page_of(cls)).name})" for cls in users)
        keys = [key for each in dict.fromkeys(users.values()) if each for key in re.split(r", (?=\w+: )", each)]
        settings = "<br>".join(f"`{key}`" for key in keys)
        those = [r for r in recipes if url in r.about]
        files = ", ".join(f"[{r.file.stem}](recipes.md#{r.file.stem})" for r in those)
        lines.append(f"| {_cell(text)} | {links} | {settings} | {files} |")
    body = ["# Paper index", "From a paper to the class that implements it, its settings, and the recipes after it."]
    body += ["\n".join(lines), "## Other papers", "Papers that the rest of the library follows."]
    rows = [f"| {_cell(text)} | `{name}` |" for text, name in elsewhere()]
    return "\n\n".join([*body, "\n".join(["| paper | module |", "| --- | --- |", *rows])]) + "\n"


def elsewhere() -> list[tuple[str, str]]:
    """Sentences with a paper in the docstrings outside of `methods`, and their modules."""
    found = []
    for file in sorted((ROOT / "stepdistill").rglob("*.py")):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        if not name.startswith(("stepdistill.methods.", DistilledDecoding.__module__)):
            nodes = ast.walk(ast.parse(file.read_text()))
            docs = [ast.get_docstring(n) for n in nodes if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
            docs = [" ".join((doc or "").split()) for doc in docs]
            sentences = [s for doc in docs for s in re.split(r"(?<=[.)]) (?=[A-Z`])", doc) if PAPER.search(s)]
            found += [(sentence, name) for sentence in dict.fromkeys(sentences)]
    return found


def _recipes(recipes: list[Recipe]) -> str:
    body = ["# Recipes", "Configs with the numbers of the papers, in `configs/recipes/`. None was run on a GPU yet."]
    lines = ["| recipe | method | family | steps | follows |", "| --- | --- | --- | --- | --- |"]
    for recipe in recipes:
        method = type(recipe.run.method)
        follows = ", ".join(f"[{url.rpartition('/')[2]}]({url})" for url in dict.fromkeys(PAPER.findall(recipe.about)))
        lines.append(
            f"| [{recipe.file.stem}](#{recipe.file.stem}) | [{method.__name__}]({Path(page_of(method)).name}) "
            f"| {recipe.teacher} | {recipe.steps} | {follows} |"
        )
    body.append("\n".join(lines))
    for recipe in recipes:
        body += [f"## {recipe.file.stem} {{ #{recipe.file.stem} }}", _fenced(recipe.command, "bash")]
        body += [_fenced("\n".join(recipe.file.read_text().splitlines()[1:]), "yaml")]
    return "\n\n".join(body) + "\n"
