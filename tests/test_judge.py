"""The judge: the template, the scores and the programs against the published classes with the same small weights."""

import dataclasses
import functools
import json
import shutil
import types

import jax
import numpy as np
import pytest
import reference
import safetensors.numpy
import torch
from PIL import Image

from data_pipelines.tokenizer import train_tokenizer
from data_pipelines.transforms import encode_png
from qimg2.evaluation import judge as pure
from qimg2.evaluation import judge_prompts, rubrics
from qimg2.models import qwen3_vl
from qimg2.rewards import vlm
from qimg2.runtime import judging
from qimg2.runtime.judge import MAX_CHOICES, Judge, Question, fit_size
from qimg2.runtime.judged import StageJudge, resize
from qimg2.runtime.rehearsal.judging import Batch, judge_part
from qimg2.sharding import identity

DIGITS = tuple((digit,) for digit in rubrics.SCALE)
TEXTS = ["Reply with one number and nothing else. 1 2 3 4 5", "yes no Yes No", "user system assistant the picture"] * 3
# The published form: a system turn if there is one, pictures where they stand, and the beginning of the reply.
TEMPLATE = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
            "{% if c.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}"
            "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def save_folder(path, tied=False):
  """A small random judge as transformers saves it: (the published class, its processor)."""
  from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor
  path.mkdir()
  train_tokenizer(TEXTS, 400).save(path / "trained.json")
  tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path / "trained.json"), eos_token="<|im_end|>", pad_token="<|endoftext|>")
  (path / "trained.json").unlink()
  ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name.replace('image', 'image_pad').replace('video', 'video_pad')}|>")
         for name in ("image", "video", "vision_start", "vision_end")}
  model = reference.tiny_qwen3_vl(3, tied, vocab_size=len(tokenizer), **ids)
  grid = dict(patch_size=16, merge_size=2, temporal_patch_size=2)
  processor = Qwen3VLProcessor(
      image_processor=Qwen2VLImageProcessor(**grid, min_pixels=32 * 32, max_pixels=512 * 512, image_mean=[0.5] * 3, image_std=[0.5] * 3),
      tokenizer=tokenizer, video_processor=Qwen3VLVideoProcessor(**grid), chat_template=TEMPLATE)
  model.save_pretrained(path)
  processor.save_pretrained(path)
  return model, processor


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
  """(folder, the published class, its processor, our judge on one device)."""
  path = tmp_path_factory.mktemp("judge") / "tiny"
  model, processor = save_folder(path)
  return path, model, processor, Judge(path, batch_size=2, devices=jax.devices()[:1])


def picture(seed, height=64, width=96):
  return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


def asked(text, *pictures, system="", answers=DIGITS):
  return Question((*pictures, text), answers, system)


QUESTIONS = [
    asked("the picture: reply with one number", picture(0)), asked("a", picture(1), system="Reply with nothing else."),
    Question((picture(2), "before, after ", picture(3, 32, 64), "which"), DIGITS),
    Question((picture(4), " is another, and quite a long text of many words follows", picture(5, 32, 64), "1 2 3"), DIGITS),
    asked("yes?", picture(6), answers=tuple(map(judge_prompts.ways_to_write, judge_prompts.YES_NO)))]


def published_inputs(processor, question):
  """What the published processor makes of a question."""
  content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in question.user]
  messages = [{"role": "system", "content": question.system}] * bool(question.system) + [{"role": "user", "content": content}]
  text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
  images = [torch.tensor(part).permute(2, 0, 1) for part in question.user if not isinstance(part, str)]
  return processor(text=text, images=images, do_resize=False, return_tensors="pt")


@torch.no_grad()
def published_logits(model, processor, question):
  return model(**published_inputs(processor, question)).logits[0, -1].numpy().astype(np.float64)


def published_probabilities(judge, logits, question):
  """By hand: the softmax over all ways to write the choices, summed for each."""
  ids = [[token for text in ways if (token := judge.tokenizer.find_token(text)) is not None] for ways in question.answers]
  odds = np.array([sum(np.exp(logits[token]) for token in tokens) for tokens in ids])
  return odds / odds.sum()


def test_sizes_equal_published_rule():
  from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
  r = np.random.RandomState(0)
  for height, width in [*r.randint(16, 3000, (200, 2)), (32, 32), (5, 900), (1024, 1024), (48, 80)]:
    theirs = smart_resize(int(height), int(width), 32, 256 * 256, 1024 * 1024)
    assert fit_size(int(height), int(width), 32, 256 * 256, 1024 * 1024) == theirs
  with pytest.raises(ValueError, match="too long and thin"):
    fit_size(1, 300, 32, 1024, 4096)


# Against the published classes.


@pytest.mark.parametrize("number", range(len(QUESTIONS)))
def test_chats_equal_published_template(judged, number):
  _, _, processor, judge = judged
  assert list(judge.prepare(QUESTIONS[number]).tokens) == published_inputs(processor, QUESTIONS[number])["input_ids"][0].tolist()


def test_scores_equal_published_logits_in_any_batch(judged):
  """One and two pictures, several lengths, several kinds of answers; together, and each alone."""
  _, model, processor, judge = judged
  rows = [judge.prepare(question) for question in QUESTIONS]
  together = judge.ask(rows)
  for row, question, ours in zip(rows, QUESTIONS, together):
    theirs = published_probabilities(judge, published_logits(model, processor, question), question)
    assert theirs.max() < 0.9999 and len(ours) == len(question.answers)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_allclose(judge.ask([row])[0], ours, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_a_few_rows_of_the_head_equal_its_whole_product(tmp_path, tied):
  _, _ = save_folder(tmp_path / "tiny", tied)
  judge = Judge(tmp_path / "tiny", devices=jax.devices()[:1])
  assert judge.cfg.tie_embeddings is tied and ("head" in judge.weights) is not tied
  state, token_count, answers = np.random.RandomState(0).randn(3, 7, judge.cfg.width).astype(np.float32), np.array([7, 1, 4]), np.array([3, 99, 7, 3])
  whole = np.asarray(qwen3_vl.logits(judge.cfg, judge.weights, state))
  few = qwen3_vl.answer_logits(judge.cfg, judge.weights, state, token_count, answers)
  np.testing.assert_allclose(few, whole[np.arange(3), token_count - 1][:, answers], rtol=1e-5, atol=1e-5)


def test_a_reward_inside_jit_equals_the_published_score(judged):
  _, model, processor, judge = judged
  question = QUESTIONS[0]
  row, values = judge.prepare(question), np.arange(1, 6, dtype=np.float32)
  reward = jax.jit(functools.partial(pure.score, judge.cfg))
  ours = reward(judge.weights, np.array([row.tokens], np.int32), np.array([len(row.tokens)], np.int32), (row.pictures[0][None],),
                np.array(row.answers, np.int32)[:, 0], values)
  theirs = published_probabilities(judge, published_logits(model, processor, question), question) @ values
  np.testing.assert_allclose(ours, [theirs], atol=1e-5)
  assert 1 < theirs < 5


def test_two_devices_judge_as_one(judged):
  path, _, _, judge = judged
  two = Judge(path, batch_size=2, devices=jax.devices()[:2])
  rows = [judge.prepare(question) for question in QUESTIONS[:2]]
  assert "fsdp" in str(two.weights["head"].sharding.spec)
  for ours, theirs in zip(two.ask(rows), judge.ask(rows)):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_rehearsal_has_the_program_that_judges(judged):
  judge = judged[3]
  mesh, part = judge_part(judge.cfg, Batch(2, 128, ((64, 96),)), "fsdp_tensor", jax.devices()[:2])
  assert mesh.size == 2 and part.function.eval_shape(*part.arguments).shape == (2, MAX_CHOICES)
  seen = {}
  judge._program, program = lambda *arguments: seen.setdefault("given", arguments) and program(*arguments), judge._program
  judge.ask([judge.prepare(QUESTIONS[0])])
  judge._program = program
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert shapes(seen["given"]) == shapes(part.arguments)


def test_digits_are_answers_only_where_all_of_them_are_one_token():
  choices, _ = judge_prompts.answer_choices("ten")
  words = {word: 100 + i for i, word in enumerate(judge_prompts.NUMBERS)}
  found = lambda vocabulary: Judge.find_answers(types.SimpleNamespace(
      tokenizer=types.SimpleNamespace(find_token=vocabulary.get), folder=types.SimpleNamespace(processor="p")), choices)
  assert found(words | {str(i): i for i in range(11)}) == tuple((i, 100 + i) for i in range(11))
  assert found(words | {str(i): i for i in range(10)}) == tuple((100 + i,) for i in range(11))  # "10" is "1" and "0"
  with pytest.raises(ValueError, match="cuts the answer '10' into several tokens"):
    found({word: token for word, token in words.items() if word != "two"} | {str(i): i for i in range(10)})


# Suites.


def write_prompts(folder, *entries):
  (folder / "prompts.json").write_text(json.dumps(entries))
  return str(folder / "prompts.json")


@pytest.fixture
def fake(judged, monkeypatch):
  """(folder, where to put the function of a row that answers, rows that were asked): suites without a network."""
  monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
  answer, seen = [None], []
  monkeypatch.setattr(Judge, "ask", lambda self, rows: [seen.append(row) or np.float32(answer[0](row)) for row in rows])
  monkeypatch.setattr(Judge, "name", "fake")
  return str(judged[0]), answer, seen


def test_a_suite_with_a_rubric_of_ones_own(judged, tmp_path, monkeypatch):
  path, model, processor, judge = judged
  monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
  (tmp_path / "mine.toml").write_text("user = '{picture}{prompt}: reply'")
  prompts = write_prompts(tmp_path, {"prompt": "the picture", "category": "c"}, {"prompt": "a"})
  suite = judging.judge_suite(str(path), prompts, str(tmp_path / "mine.toml"), batch_size=2)
  tasks = suite.tasks(2, 7)
  assert sorted(task.name for task in tasks) == ["0", "1"] and suite.tasks(1, 7) == tasks[:1]
  broken = np.zeros((64, 96, 4), np.uint8)
  first, second = suite.score_batch(tasks, [picture(0), broken])
  logits = published_logits(model, processor, asked(f"{tasks[0].prompt}: reply", picture(0)))
  p = published_probabilities(judge, logits, asked(""))
  assert first["mine"] == pytest.approx(float(p @ np.arange(1, 6)), abs=1e-4) and first["mine probabilities"] == pytest.approx(p.tolist(), abs=1e-5)
  assert first["judge"].startswith("tiny, weights ") and set(second) == {"error"} and "composite it on white" in second["error"]
  opened = judging.open_judge(str(path), 1024, 2, 8192)
  held = opened.weights
  suite.release()
  assert opened.weights is not held  # read again
  with pytest.raises(ValueError, match="3 prompts are asked for"):
    suite.tasks(3, 0)


def test_edits_are_seen_source_first_and_quality_without_it(fake, tmp_path):
  folder, answer, seen = fake
  (tmp_path / "s.png").write_bytes(encode_png(picture(1, 64, 64)))
  suite = judging.judge_suite(folder, write_prompts(tmp_path, {"prompt": "red", "sources": ["s.png"]}), "edit")
  scores = iter([4, 2, 5, 3])
  answer[0] = lambda row: np.eye(5)[next(scores) - 1]
  task, = suite.tasks(1, 0)
  found, = suite.score_batch([task], [picture(2, 160, 96)])
  assert {name: found[name] for name in suite.figures} == pytest.approx(
      {"instruction": 4, "over_editing": 2, "naturalness": 5, "artefacts": 3, "SC": 2, "PQ": 3, "O": 6**0.5})
  assert [[x.shape[:2] for x in row.pictures] for row in seen] == [[(64, 64)] * 2] * 2 + [[(64, 64)]] * 2  # at the size of the source
  np.testing.assert_array_equal(seen[0].pictures[0], picture(1, 64, 64))
  assert [caption for _, caption in suite.show(task, picture(2), found)][1].endswith("artefacts 3.00, SC 2.00, PQ 3.00, O 2.45]")
  np.testing.assert_array_equal(seen[0].pictures[1], seen[2].pictures[0])


def test_soft_tifa_of_a_suite(fake, tmp_path):
  folder, answer, seen = fake
  questions = [["Is it red?", "yes"], ["Is it blue?", "No"], ["Is it large?", "Yes"]]
  prompts = write_prompts(tmp_path, {"prompt": "x", "vqa_list": questions, "skills": ["colour", "colour", "size"]})
  suite = judging.tifa_suite(folder, prompts)
  answer[0] = lambda row: [0.9, 0.1]
  found, = suite.score_batch(suite.tasks(1, 0), [picture(0)])
  assert found["probabilities"] == pytest.approx([0.9, 0.1, 0.9]) and len(seen) == 3
  assert found["soft_tifa_am"] == pytest.approx(1.9 / 3) and found["soft_tifa_gm"] == pytest.approx(0.081 ** (1 / 3))
  ratio = {name: found[figure.numerator] / found[figure.denominator] for name, figure in suite.figures.items() if figure.denominator}
  assert ratio == pytest.approx({"colour": 0.5, "size": 0.9})
  answer[0] = lambda row: [np.nan, np.nan]
  assert suite.score_batch(suite.tasks(1, 0), [picture(0)]) == [{"error": "the judge's logits are not finite"}]


def test_a_pair_is_asked_in_both_orders(fake, tmp_path):
  folder, answer, seen = fake
  task = judging.judge_suite(folder, write_prompts(tmp_path, {"prompt": "x"})).tasks(1, 0)[0]
  dark, bright = picture(0) // 4, picture(1)
  compare = lambda: judging.compare_pictures(judging.open_judge(folder), [task, task], [bright, dark], [dark, bright])
  answer[0] = lambda row: [0.8, 0.2] if row.pictures[0].mean() > row.pictures[1].mean() else [0.2, 0.8]
  found = compare()
  assert [one["win"] for one in found] == pytest.approx([0.8, 0.2]) and [one["contradiction"] for one in found] == [0, 0]
  np.testing.assert_array_equal(seen[0].pictures[0], seen[1].pictures[1])
  answer[0] = lambda row: [0.7, 0.3]  # it looks at the place alone
  assert [(one["win"], one["contradiction"]) for one in compare()] == [(0.5, 1), (0.5, 1)]


def test_pictures_against_those_of_another_folder(fake, tmp_path):
  folder, answer, _ = fake
  prompts = write_prompts(tmp_path, {"prompt": "x", "name": "a"}, {"prompt": "y", "name": "b"})
  suite = judging.pairwise_suite(folder, prompts, str(tmp_path), rival_seed=3)
  (tmp_path / "a_3.png").write_bytes(encode_png(picture(0) // 4))
  answer[0] = lambda row: [0.8, 0.2] if row.pictures[0].mean() > row.pictures[1].mean() else [0.2, 0.8]
  assert suite.figures["win"].null == 0.5  # a p-value stands beside it
  tasks = sorted(suite.tasks(0, 0), key=lambda task: task.name)
  first, second = suite.score_batch(tasks, [picture(1), picture(1)])
  assert first["win"] == pytest.approx(0.8) and first["contradiction"] == 0
  assert set(second) == {"error"} and "no picture of this prompt with seed 3" in second["error"]
  with pytest.raises(ValueError, match="no folder .*nowhere of pictures"):
    judging.pairwise_suite(folder, prompts, str(tmp_path / "nowhere"))


def test_pairs_are_seen_at_one_size(fake, tmp_path):
  folder, answer, seen = fake
  task = judging.judge_suite(folder, write_prompts(tmp_path, {"prompt": "x"})).tasks(1, 0)[0]
  answer[0] = lambda row: [0.5, 0.5]
  found = judging.compare_pictures(judging.open_judge(folder), [task] * 2, [picture(0, 64, 96)] * 2, [picture(1, 128, 192), picture(1, 96, 96)])
  assert [[x.shape[:2] for x in row.pictures] for row in seen] == [[(64, 96)] * 2] * 2
  assert found[0]["win"] == 0.5 and found[1] == {"error": "a picture of 96 x 64 px and one of 96 x 96 px have other proportions"}


def test_what_cannot_be_judged_is_one_sentence(judged, fake, tmp_path):
  folder, tiny = fake[0], judged[3]
  prompts = write_prompts(tmp_path, {"prompt": "x"})
  with pytest.raises(ValueError, match="looks at what was edited"):
    judging.judge_suite(folder, prompts, "edit")
  with pytest.raises(ValueError, match="each once"):
    judging.judge_suite(folder, prompts, "text,text")
  with pytest.raises(ValueError, match="no condition image .*gone.png, which .*prompts.json names"):
    judging.judge_suite(folder, write_prompts(tmp_path, {"prompt": "x", "sources": ["gone.png"]})).tasks(0, 0)
  write_prompts(tmp_path, {"prompt": "x"})
  with pytest.raises(ValueError, match="has no questions"):
    judging.tifa_suite(folder, prompts)
  with pytest.raises(ValueError, match="cuts the answer 'ten' into several tokens"):
    judging.tifa_suite(folder, write_prompts(tmp_path, {"prompt": "x", "questions": [["How many?", "two"]]}))
  with pytest.raises(ValueError, match="no config.json"):
    judging.judge_suite(str(tmp_path), prompts)
  with pytest.raises(ValueError, match="begin with the same token"):
    tiny.find_answers((("1",), ("2", "1")))
  with pytest.raises(ValueError, match="more than max_tokens 40"):
    Judge(folder, max_tokens=40).prepare(asked("long " * 40, picture(0)))


@pytest.mark.parametrize("spoil,message", [
    (lambda path: (path / "chat_template.jinja").write_text("{{ '<|im_start|>assistant\\n<think>\\n' }}"), "take an Instruct model"),
    (lambda path: (path / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    (lambda path: remove_head(path / "model.safetensors"), "lack lm_head.weight")], ids=["thinking", "tokenizer", "head"])
def test_a_folder_that_cannot_judge_is_one_sentence(judged, tmp_path, spoil, message):
  shutil.copytree(judged[0], tmp_path / "spoilt")
  spoil(tmp_path / "spoilt")
  with pytest.raises(ValueError, match=message):
    Judge(tmp_path / "spoilt", devices=jax.devices()[:1]).weights  # noqa: B018


def test_the_text_encoder_of_a_pipeline_judges_too(tiny_folder):
  judge = Judge(tiny_folder, devices=jax.devices()[:1])
  assert judge.weights["head"].shape == (judge.cfg.width, judge.cfg.vocab_size) and judge.prepare(asked("a poster", picture(0))).tokens


def remove_head(path):
  weights = safetensors.numpy.load_file(path)
  weights.pop("lm_head.weight")
  safetensors.numpy.save_file(weights, path)


@pytest.mark.parametrize("shape, size", [((96, 192), (64, 64)), ((64, 64), (96, 128)), ((64, 96), (64, 96))])
def test_pictures_are_resized_on_the_device_as_on_the_host(shape, size):
  pictures = np.stack([picture(seed, *shape) for seed in range(2)])
  expected = np.stack([Image.fromarray(one).resize(size[::-1], Image.Resampling.BICUBIC) for one in pictures])
  found = np.asarray(jax.jit(resize, static_argnums=1)(pictures, size))
  off = np.abs(found.astype(int) - expected)
  assert found.dtype == np.uint8 and off.max() <= 1 and off.mean() < 0.02


@pytest.mark.slow
def test_a_stage_asks_its_judge_about_every_picture_inside_jit(judged, tmp_path, caplog):
  """Two pictures of each prompt beside its source, as the judge itself is asked; resized as on the host; a prompt that is too long has no score."""
  (tmp_path / "short.toml").write_text('user = "{sources}{picture}{prompt}"')
  settings = vlm.Judge(str(judged[0]), str(tmp_path / "short.toml"), 64, 48)
  rewards, sizes = StageJudge({"edit": settings}), ((96, 192), ((64, 64),))
  tasks = [{"prompt": "a cat"}, {"prompt": "a dog, " * 20, "sample_id": 7}, {"prompt": "a bird"}]
  pictures, sources = np.stack([picture(seed, *sizes[0]) for seed in range(6)]), np.stack([picture(seed, *sizes[1][0]) for seed in range(6, 9)])
  asked = rewards.arrays(tasks, *sizes)
  assert {key: x.shape for key, x in asked.items()} == {key: x.shape for key, x in rewards.shapes(3, *sizes).items()}
  judge, weights = rewards.rewards["edit"].judge, judged[3].weights
  judge._weights = weights
  score = jax.jit(lambda params, samples, batch: rewards.score(params, types.SimpleNamespace(shard=identity), samples, batch))
  found = score({"judge": weights}, {"pictures": pictures}, asked | {"sources": (sources,)})["edit"]
  fill = rubrics.find_rubric(settings.rubric).fill
  rows = [judge.prepare(Question(fill(tasks[row // 2], {"picture": [judge.fit(pictures[row], sources[row // 2])], "sources": [sources[row // 2]]}),
                                 DIGITS)) for row in (0, 1, 4, 5)]
  expected = np.stack(judge.ask(rows)) @ np.arange(1, 6, dtype=np.float32)
  np.testing.assert_allclose(found, [*expected[:2], np.nan, np.nan, *expected[2:]], atol=1e-3)
  assert "reward edit is not asked about sample 7: rubric and prompt have" in caplog.text
  some = StageJudge({"edit": settings}, is_asked=lambda name, task: task["prompt"] != "a cat").arrays(tasks, *sizes)
  np.testing.assert_array_equal(some["judge_edit_count"], [0, 0, asked["judge_edit_count"][2]])
  assumed = StageJudge({"edit": dataclasses.replace(settings, pretrained="elsewhere")}, judge.cfg)  # as a rehearsal has it
  assert {key: x.shape for key, x in assumed.shapes(3, *sizes).items()} == {key: x.shape for key, x in asked.items()}
  assert jax.tree.structure(assumed.specs) == jax.tree.structure(rewards.specs)
  with pytest.raises(ValueError, match="name one folder"):
    StageJudge({name: dataclasses.replace(settings, pretrained=name) for name in ("here", "elsewhere")})
