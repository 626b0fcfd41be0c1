"""Evaluation suites that a vision-language model scores: rubrics, questions about pictures, and pairs of pictures.

The pictures of a call are judged together, and what one of them cannot be asked leaves out that one alone, with the reason.
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.transforms import decode_image
from qimg2.evaluation import ERROR, Figure, Suite, Task
from qimg2.evaluation.judge_prompts import Prompt, read_prompts
from qimg2.evaluation.judge_scores import EDIT, OVERALL, Preference, edit_scores, soft_tifa
from qimg2.evaluation.rubrics import PAIRWISE, QUESTION, Rubric, find_rubric
from qimg2.runtime.judge import Judge, Question
from qimg2.runtime.rivals import Rivals

EDIT_RUBRICS = ",".join(name for names in EDIT.values() for name in names)
ORDERS = (("first", "second"), ("second", "first"))  # which picture takes which place
MAX_STRETCH = 1.1  # by which the ratios of the sides of two pictures may differ
Asked = Sequence[Question]

open_judge = functools.lru_cache(maxsize=1)(Judge)  # suites of one judge share its weights


def judge_suite(pretrained: str, prompts: str, rubrics: str = "prompt_following,aesthetics", side_px: int = 1024, batch_size: int = 8,
                max_tokens: int = 8192) -> Suite:
  """Pictures scored by rubrics: for each the expected score, and as a list the probabilities of its answers.

  With the four rubrics of an edit, which "edit" stands for, also SC, PQ and O, see `qimg2.evaluation.judge_scores`. An edited picture is seen at the
  size of its first condition image.

  Args:
    pretrained: folder of the judge.
    prompts: file of prompts, see `qimg2.evaluation.judge_prompts`.
    rubrics: names or .toml files, with commas between them.
    side_px, batch_size, max_tokens: as in `Judge`.

  Raises:
    ValueError: no such folder, file or rubric, a rubric's answer that is no token, or a rubric that shows sources to prompts that have none.
  """
  names = [name.strip() for name in (EDIT_RUBRICS if rubrics == "edit" else rubrics).split(",") if name.strip()]
  asked, read = {rubric.name: rubric for rubric in map(find_rubric, names)}, read_prompts(prompts)
  if len(asked) < max(1, len(names)):
    raise ValueError(f"rubrics is {rubrics!r}: name at least one rubric, and each once.")
  for name, rubric in asked.items():
    if "sources" in rubric.marks and not all(prompt.sources for prompt in read):
      raise ValueError(f"The rubric {name!r} looks at what was edited, but {prompts} has prompts without sources: choose other rubrics or prompts.")
  judge = open_judge(pretrained, side_px, batch_size, max_tokens)
  answers = {name: _bare(judge, rubric) for name, rubric in asked.items()}

  def questions(task: Task, picture: np.ndarray) -> Asked:
    pictures, texts = _pictures(judge, task, picture=picture), {"prompt": task.prompt}
    return [Question(rubric.fill(texts, pictures), answers[name], rubric.system) for name, rubric in asked.items()]

  def scores(task: Task, found: Sequence[np.ndarray]) -> dict[str, Any]:
    del task
    means = {name: float(p @ np.asarray(rubric.values, np.float32)) for (name, rubric), p in zip(asked.items(), found)}
    return {**means, **edit_scores(means), **{f"{name} probabilities": p.tolist() for name, p in zip(asked, found)}}

  figures = [*asked, *(name for name in (*EDIT, OVERALL) if edit_scores(dict.fromkeys(asked, 1.0)))]
  return Suite(_tasks(read, prompts), score_batch=_score_batch(judge, asked.values(), questions, scores), show=_show(figures), release=judge.release,
               figures={name: Figure(name, is_share=False) for name in figures})


def tifa_suite(pretrained: str, prompts: str, rubric: str = "question", side_px: int = 1024, batch_size: int = 8, max_tokens: int = 8192) -> Suite:
  """Soft-TIFA: how probable the expected answers to questions about a picture are; the arithmetic and the geometric mean over its questions.

  Where the file says what questions are about, also one figure for each skill: the mean over its questions of all pictures.

  Args: as in `judge_suite`; each of the prompts has questions.

  Raises:
    ValueError: as `judge_suite`, or a prompt without questions.
  """
  asked, read = find_rubric(rubric, QUESTION), read_prompts(prompts)
  if missing := [prompt.name for prompt in read if not prompt.questions]:
    raise ValueError(f"The prompt {missing[0]!r} of {prompts} has no questions: write some, or leave it out.")
  judge = open_judge(pretrained, side_px, batch_size, max_tokens)
  for choices in dict.fromkeys(question.choices for prompt in read for question in prompt.questions):
    judge.find_answers(choices)
  skills = sorted({question.skill for prompt in read for question in prompt.questions} - {""})

  def questions(task: Task, picture: np.ndarray) -> Asked:
    pictures = _pictures(judge, task, picture=picture)
    return [Question(asked.fill({"prompt": task.prompt, "question": one.text}, pictures), one.choices, asked.system) for one in task.truth]

  def scores(task: Task, found: Sequence[np.ndarray]) -> dict[str, Any]:
    p = [float(np.clip(one[question.expected], 0, 1)) for one, question in zip(found, task.truth)]  # a float32 sum may be a bit above 1
    of = {skill: [x for x, question in zip(p, task.truth) if question.skill == skill] for skill in skills}
    sums = {f"{skill} sum": sum(some) for skill, some in of.items()} | {f"{skill} number": len(some) for skill, some in of.items()}
    arithmetic, geometric = soft_tifa(p)
    return {"soft_tifa_am": arithmetic, "soft_tifa_gm": geometric, **sums, "probabilities": p}

  figures = {name: Figure(name) for name in ("soft_tifa_am", "soft_tifa_gm")}
  return Suite(_tasks(read, prompts, lambda prompt: prompt.questions), show=_show(figures), release=judge.release,
               score_batch=_score_batch(judge, [asked], questions, scores),
               figures=figures | {skill: Figure(f"{skill} sum", f"{skill} number") for skill in skills})


def pairwise_suite(pretrained: str, prompts: str, rivals: str, rival_seed: int = 0, rubric: str = PAIRWISE, side_px: int = 1024, batch_size: int = 8,
                   max_tokens: int = 8192) -> Suite:
  """Pictures against those of another evaluation for the same prompts, in both orders, as `compare_pictures` scores them.

  Args:
    pretrained, prompts, side_px, batch_size, max_tokens: as in `judge_suite`.
    rivals: folder of the other pictures, as `qimg2.runtime.rivals.Rivals` takes it.
    rival_seed: which of them each picture is compared with, whatever its own seed.
    rubric: name or .toml file.

  Raises:
    ValueError: as `judge_suite`, `compare_pictures` and `Rivals`. A rival that is missing, or was drawn for another prompt, leaves its picture out,
      with this reason.
  """
  judge, others = open_judge(pretrained, side_px, batch_size, max_tokens), Rivals(rivals, rival_seed)
  _pair_rubric(judge, rubric)

  def score_batch(tasks: Sequence[Task], pictures: Sequence[np.ndarray]) -> list[Mapping[str, Any]]:
    pairs, results = [], [{} for _ in tasks]
    for number, (task, picture) in enumerate(zip(tasks, pictures, strict=True)):
      try:
        pairs.append((number, picture, others.read(task)))
      except ValueError as error:
        results[number] = {ERROR: str(error)}
    numbers, first, second = zip(*pairs) if pairs else ((), (), ())
    for number, found in zip(numbers, compare_pictures(judge, [tasks[i] for i in numbers], first, second, rubric)):
      results[number] = found
    return results
  figures = {"win": Figure("win", null=0.5), "contradiction": Figure("contradiction", lower_is_better=True)}
  return Suite(_tasks(read_prompts(prompts), prompts), show=_show(figures), release=judge.release, score_batch=score_batch, figures=figures)


def compare_pictures(judge: Judge, tasks: Sequence[Task], first: Sequence[np.ndarray], second: Sequence[np.ndarray],
                     rubric: str = PAIRWISE) -> list[dict[str, Any]]:
  """For each pair what `Suite.score_batch` would give: "win", the probability 0..1 that the first picture is better; "contradiction", 1.0 where the
  order decided; and as a list the probabilities of both orders. `qimg2.evaluation.judge_scores.pairwise_figures` sums up.

  The judge sees both at one size: that of the first condition image, or of the first picture where there is none. Then pictures of other proportions,
  whose sides differ in ratio by more than `MAX_STRETCH`, are not compared: one would be stretched.

  Raises:
    ValueError: no such rubric, or one with other answers than two.
  """
  asked, answers = _pair_rubric(judge, rubric)

  def questions(task: Task, pair: tuple[np.ndarray, np.ndarray]) -> Asked:
    (height, width), (rival_height, rival_width) = (one.shape[:2] for one in pair)
    stretch = width * rival_height / (height * rival_width)
    if not task.sources and max(stretch, 1 / stretch) > MAX_STRETCH:
      raise ValueError(f"a picture of {width} x {height} px and one of {rival_width} x {rival_height} px have other proportions")
    orders = [_pictures(judge, task, pair[0], **dict(zip(places, pair))) for places in ORDERS]
    return [Question(asked.fill({"prompt": task.prompt}, pictures), answers, asked.system) for pictures in orders]

  def scores(task: Task, found: Sequence[np.ndarray]) -> dict[str, Any]:
    del task
    one = Preference(*(float(np.clip(p[0], 0, 1)) for p in found))
    return {"win": one.win, "contradiction": float(one.contradicts), "probabilities": [one.first, one.swapped]}
  return _score_batch(judge, [asked], questions, scores)(tasks, list(zip(first, second, strict=True)))


def _pair_rubric(judge: Judge, name: str) -> tuple[Rubric, tuple[tuple[str, ...], ...]]:
  """(the rubric that compares two pictures, its answers as choices)."""
  rubric = find_rubric(name, PAIRWISE)
  if len(rubric.answers) != 2:
    raise ValueError(f"The rubric {name!r} has {len(rubric.answers)} answers: for two pictures it must have two, that of the first one first.")
  return rubric, _bare(judge, rubric)


def _show(metrics: Iterable[str]) -> Callable[[Task, np.ndarray, Mapping[str, Any]], list[tuple[np.ndarray, str]]]:
  """`Suite.show` with these metrics, or why there are none, in the caption."""
  def show(task: Task, picture: np.ndarray, scores: Mapping[str, Any]) -> list[tuple[np.ndarray, str]]:
    said = scores[ERROR] if ERROR in scores else ", ".join(f"{name} {scores[name]:.2f}" for name in metrics)
    return [(source, "(source)") for source in task.sources] + [(picture, f"{task.prompt} [{said}]")]
  return show


def _bare(judge: Judge, rubric: Rubric) -> tuple[tuple[str, ...], ...]:
  """The answers of a rubric as choices, each written in one way, which must be one token."""
  answers = tuple((answer,) for answer in rubric.answers)
  judge.find_answers(answers)
  return answers


def _pictures(judge: Judge, task: Task, size_of: np.ndarray | None = None, **pictures: np.ndarray) -> dict[str, Sequence[np.ndarray]]:
  """{mark of a rubric: pictures as the judge sees them}; results of edits at the size of the first condition image, others at that of `size_of`."""
  like = task.sources[0] if task.sources else size_of
  return {"sources": [judge.fit(source) for source in task.sources], **{mark: [judge.fit(picture, like)] for mark, picture in pictures.items()}}


@dataclasses.dataclass(frozen=True)
class LazySources(Sequence):
  """Condition images [h, w, 3] uint8 of a task, which are read from their files when they are looked at: those of many tasks need no memory."""
  paths: tuple[pathlib.Path, ...]

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, place: Any) -> Any:
    """The image of a place; of a slice a tuple. `ValueError` if its file is none."""
    return tuple(map(_open, self.paths[place])) if isinstance(place, slice) else _open(self.paths[place])


def _tasks(prompts: Sequence[Prompt], path: str, truth: Callable[[Prompt], Any] = lambda prompt: None) -> Callable[[int, int], list[Task]]:
  """`Suite.tasks`: the first of the file's prompts in an order that the seed gives, all for 0."""
  if len({len(prompt.sources) for prompt in prompts}) > 1:
    raise ValueError(f"The prompts of {path} have different numbers of sources: write a file for each number.")

  def tasks(num: int, seed: int) -> list[Task]:
    if num > len(prompts):
      raise ValueError(f"{num} prompts are asked for, but {path} has {len(prompts)}: lower num_prompts.")
    chosen = [prompts[i] for i in np.random.RandomState(seed).permutation(len(prompts))[:num or None]]
    if missing := next((source for one in chosen for source in one.sources if not source.is_file()), None):
      raise ValueError(f"There is no condition image {missing}, which {path} names: put it there.")
    return [Task(one.prompt, one.size, LazySources(one.sources), truth(one), one.name, one.category) for one in chosen]
  return tasks


@functools.lru_cache(maxsize=8)  # what is done with a task looks at its images several times
def _open(path: pathlib.Path) -> np.ndarray:
  found = decode_image(path.read_bytes(), str(path))
  found.flags.writeable = False
  return found


def _score_batch(judge: Judge, rubrics: Iterable[Rubric], questions: Callable[[Task, Any], Asked],
                 scores: Callable[[Task, Sequence[np.ndarray]], dict[str, Any]]) -> Callable[..., list[Mapping[str, Any]]]:
  """`Suite.score_batch` of what to ask about each picture and what its answers say."""
  digest = hashlib.sha256("\n".join(f"{one.system}\n{one.user}\n{one.answers}" for one in rubrics).encode()).hexdigest()[:16]

  def score_batch(tasks: Sequence[Task], pictures: Sequence[Any]) -> list[Mapping[str, Any]]:
    rows, parts, results = [], {}, [{} for _ in tasks]
    for number, (task, picture) in enumerate(zip(tasks, pictures, strict=True)):
      try:
        mine = [judge.prepare(question) for question in questions(task, picture)]
      except ValueError as error:
        results[number] = {ERROR: str(error)}
        continue
      parts[number] = slice(len(rows), len(rows) + len(mine))
      rows += mine
    found = judge.ask(rows)
    for number, part in parts.items():
      finite = all(np.all(np.isfinite(p)) for p in found[part])
      results[number] = {**scores(tasks[number], found[part]), "judge": f"{judge.name}, rubrics {digest}"} if finite else {
          ERROR: "the judge's logits are not finite"}
    return results
  return score_batch
