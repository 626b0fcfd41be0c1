"""What each reward gives, by hand; and what is lost where something goes wrong: one number, which is then missing and never 0."""

import base64
import contextlib
import dataclasses
import functools
import http.server
import json
import pickle
import threading
import time

import numpy as np
import pytest
from scipy import ndimage

from data_pipelines.embedded import glyphs
from data_pipelines.transforms import decode_image
from qimg2.evaluation.text_rendering import render
from qimg2.rewards import LARGEST
from qimg2.rewards.edits import kept
from qimg2.rewards.glyphs import glyph
from qimg2.rewards.own import own
from qimg2.rewards.pool import Pool
from qimg2.rewards.scoring import Scorer
from qimg2.rewards.service import service
from qimg2.rewards.text import read_text, texts_of

PICTURES = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
ours = lambda name: own(f"tests.jobs.toy_rewards:{name}")


def score(rewards, pictures, tasks, num_processes=2, timeout_s=60.0, is_asked=lambda name, task: True):
  with Scorer(rewards, {name: timeout_s for name in rewards}, is_asked, num_processes) as scorer:
    return {name: x.tolist() for name, x in scorer(pictures, tasks).items()}


# Processes.


def test_what_goes_wrong_with_a_picture_costs_that_number_alone(caplog):
  does = ["sleep", "die", "raise", "text", 2.5]
  tasks = [{"do": do, "sample_id": number} for number, do in enumerate(does)]
  found = score({"trouble": ours("trouble"), "pixel": ours("pixel")}, PICTURES, tasks, timeout_s=4.0)
  np.testing.assert_array_equal(found["trouble"], [np.nan] * 4 + [2.5])
  assert found["pixel"] == [0, 1, 2, 3, 4]
  for number, reason in enumerate(("it took more than 4 s", "the process that scored it ended with code 3",
                                   "ZeroDivisionError: a mistake in the function", "could not convert string to float: 'text'")):
    assert f"trouble has no number for 1 of 5 pictures, such as that of sample {number} (''): {reason}" in caplog.text


def test_numbers_come_in_the_order_of_the_pictures_from_processes_without_jax():
  tasks = [{"sources": ("a picture",)}] * 4
  blind = lambda name: dataclasses.replace(ours(name), sees_pictures=False)
  assert score({"pixel": blind("pixel"), "jax": blind("knows_jax")}, PICTURES[:4], tasks) == {"pixel": [0, 1, 2, 3], "jax": [0] * 4}


def test_what_is_not_asked_for_is_not_scored_and_not_missed(caplog):
  tasks = [{"do": do} for do in (1, "raise", 3)]
  found = score({"trouble": ours("trouble")}, PICTURES[:3], tasks, 1, is_asked=lambda name, task: task["do"] != "raise")
  np.testing.assert_array_equal(found["trouble"], [1, np.nan, 3])
  assert "no number" not in caplog.text


def test_what_a_function_loads_is_loaded_before_its_first_picture_with_a_time_out_of_its_own():
  assert score({"loaded": ours("loaded")}, PICTURES[:1], [{}], 1, timeout_s=0.5) == {"loaded": [1.0]}
  late = own("tests.jobs.toy_rewards:loaded", setup_timeout_s=0.2)
  with Scorer({"own": late}, {"own": 1.0}, lambda *_: True, 1) as scorer, pytest.raises(ValueError, match="the setup of .* not done within 0.2 s"):
    scorer.start()


def test_a_process_that_is_killed_and_not_replaced_costs_its_pictures_and_at_last_the_stage(tmp_path, monkeypatch, caplog):
  monkeypatch.setenv("LOADED_FAILS", str(tmp_path / "mark"))
  with Scorer({"loaded": ours("loaded")}, {"loaded": 5.0}, lambda *_: True, 1) as scorer:
    scorer.start()
    np.testing.assert_array_equal(scorer(PICTURES[:3], [{}, {"do": "die"}, {}])["loaded"], [1, np.nan, np.nan])
    assert "ended with SIGKILL, as the system ends one when memory is short" in caplog.text
    assert "cannot begin (setup: MemoryError: no room)" in caplog.text
    with pytest.raises(ValueError, match="setup: MemoryError: no room"):
      scorer(PICTURES[:3], [{}] * 3)


def test_a_pool_that_is_left_waits_for_no_picture():
  with Pool({"trouble": ours("trouble").score}, {"trouble": 60.0}, 1) as pool:
    pool.start()
    futures = pool.begin(PICTURES[:2], [{"do": "sleep"}] * 2, [["trouble"]] * 2)
    begin = time.monotonic()
  assert time.monotonic() - begin < 30 and futures[1].cancelled() and isinstance(futures[0].exception(), RuntimeError)


@pytest.mark.parametrize("name, message", [("nothing", "ValueError: the module tests.jobs.toy_rewards has no function 'nothing'"),
                                           ("CENTRES", "has no function 'CENTRES'")])
def test_a_function_that_is_not_there_is_named_before_anything_is_scored(name, message):
  with Scorer({"own": ours(name)}, {"own": 1.0}, lambda *_: True, 1) as scorer, pytest.raises(ValueError, match=f"cannot begin .*{message}"):
    scorer.start()


def test_the_users_module_is_looked_for_and_not_imported():
  ours("near").check_machine()
  for module in ("no_such_module", "tests.no_such_module", "no_such_package.module"):
    with pytest.raises(ValueError, match=f"there is no module '{module}' for the function '{module}:f': start the run where it lies"):
      own(f"{module}:f").check_machine()
  for wrong in ("module", "module:", ":name", "a b:c", "module:a.b"):
    with pytest.raises(ValueError, match="write module:function"):
      own(wrong)
  assert own("tests.jobs.toy_rewards:pixel").score(PICTURES[3], {}) == 3  # in this process, too


# HTTP.


@contextlib.contextmanager
def serving(*answers):
  """(address, requests so far) of a server that gives these answers in turn, (status, JSON or bytes), or None at all while it runs."""
  requests, left, ended = [], list(answers), threading.Event()

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
      requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
      answer = left.pop(0)
      if answer is None:
        ended.wait()
        return
      self.send_response(answer[0])
      self.end_headers()
      self.wfile.write(answer[1] if isinstance(answer[1], bytes) else json.dumps(answer[1]).encode())

    def log_message(self, *_):
      pass
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  try:
    yield f"http://127.0.0.1:{server.server_port}/score", requests
  finally:
    ended.set()
    server.shutdown()
    server.server_close()


ask = functools.partial(service, parallel=1, timeout_s=60.0, backoff_s=0.01)


def test_a_service_gets_pictures_and_tasks_in_batches_and_answers_in_order():
  tasks = [{"prompt": f"é{number}", "sources": (PICTURES[number],), "reference": PICTURES[0]} for number in range(3)]
  with serving((200, {"rewards": [0.5, None]}), (200, {"rewards": [7]})) as (url, requests):
    numbers, reasons = zip(*ask(url, batch_size=2, send_sources=True).score_batch(PICTURES[:3], tasks))
  np.testing.assert_array_equal(numbers, [0.5, np.nan, 7])
  assert reasons == ("", "it gave null", "") and [len(one["tasks"]) for one in requests] == [2, 1]
  decode = lambda text: np.asarray(decode_image(base64.b64decode(text), "it"))
  np.testing.assert_array_equal(decode(requests[1]["pictures"][0]), PICTURES[2])
  assert requests[1]["tasks"][0].keys() == {"prompt", "sources"} and requests[1]["tasks"][0]["prompt"] == "é2"
  np.testing.assert_array_equal(decode(requests[1]["tasks"][0]["sources"][0]), PICTURES[2])


@pytest.mark.parametrize("answers, reason", [
    (((503, b""), (429, b"later"), (200, {"rewards": [1.0]})), ""),
    (((500, b"out of memory"), (500, b"out of\nmemory"), (500, b"out of memory")), "it answered 500: out of memory; it was asked 3 times"),
    (((404, b"what?"),), "it answered 404: what?"),
    (((200, {"rewards": [1.0, 2.0]}),), "has not 1 rewards, numbers or null"),
    (((200, {"rewards": ["1"]}),), "has not 1 rewards, numbers or null"),
    (((200, b"<html>"),), "b'<html>' is no JSON object with rewards"),
    (((200, b'{"rewards": [1e300]}'),), "it is 1e+300"),
    (((200, b'{"rewards": [NaN]}'),), "it is nan")])
def test_a_service_that_fails_is_asked_again_where_that_may_help(answers, reason):
  with serving(*answers) as (url, requests):
    (number, why), = ask(url, retries=2).score_batch(PICTURES[:1], [{"prompt": ""}])
  assert len(requests) == len(answers) and reason in why and (number == 1.0 if not reason else np.isnan(number))


def test_a_service_that_is_silent_or_gone_costs_its_pictures_and_says_so(caplog):
  with serving(None, None) as (url, requests):
    found = score({"service": ask(url, retries=1, timeout_s=0.5)}, PICTURES[:2], [{"prompt": "a"}, {"prompt": "b"}])
    while len(requests) < 2:  # the server reads it when it gets to it
      time.sleep(0.01)
  np.testing.assert_array_equal(found["service"], [np.nan] * 2)
  assert len(requests) == 2 and f"service has no number for 2 of 2 pictures, such as that of sample unknown ('a'): {url}: TimeoutError" in caplog.text
  (number, why), = ask(url, retries=0).score_batch(PICTURES[:1], [{}])  # nothing listens there any more
  assert np.isnan(number) and "refused" in why and "asked 1 times" in why


@pytest.mark.parametrize("settings", [{"batch_size": 0}, {"timeout_s": 0.0}, {"retries": -1}])
def test_settings_of_a_service_that_make_no_sense_are_refused(settings):
  with pytest.raises(ValueError, match="give at least 1, 1, 0"):
    service("http://a", **settings)
  with pytest.raises(ValueError, match="give an address such as http"):
    service("127.0.0.1:80")


# What they measure.


@pytest.mark.parametrize("task, texts", [
    ({"prompt": 'a sign "OPEN" and “NOW”'}, ["OPEN", "NOW"]), ({"prompt": "a cat's sign 'it's late'"}, ["it's late"]),
    ({"prompt": "「開店」と『本日』"}, ["開店", "本日"]), ({"prompt": 'no', "text": "one"}, ["one"]),
    ({"prompt": '"x"', "text": ["a", "b"]}, ["a", "b"]),
    ({"prompt": "a cat's tail"}, None), ({"prompt": '""'}, None), ({"prompt": '"x"', "text": []}, None), ({"prompt": '"x"', "text": 3}, None)])
def test_the_texts_of_a_task_are_its_truth_or_what_its_prompt_quotes(task, texts):
  if texts is None:
    with pytest.raises(ValueError, match="its record"):
      texts_of(task)
  else:
    assert texts_of(task) == texts


def test_text_counts_from_both_sides():
  """What is drawn twice has 2 n / 3 n, and half of it n / 1.5 n."""
  say = lambda *texts: render(texts, 160, 320)
  task, by_characters, by_words = {"prompt": 'a sign "OPEN NOW"'}, read_text().score, read_text("words").score
  assert by_characters(say("OPEN NOW"), task) == by_words(say("Open now"), task) == 1
  assert by_characters(say("OPEN NOW", "OPEN NOW"), task) == pytest.approx(2 / 3)
  assert by_characters(say("NOW"), task) == pytest.approx(2 * 3 / (7 + 3)) and by_words(say("NOW"), task) == pytest.approx(2 / 3)
  assert by_characters(np.full((64, 64, 3), 255, np.uint8), task) == 0  # a picture that says nothing, which is no failure
  with pytest.raises(ValueError, match="the OCR cannot read the characters '안녕"):
    read_text().check({"prompt": '"안녕"'})
  with pytest.raises(ValueError, match="units is 'letters': choose one of"):
    read_text("letters")


def test_glyphs_are_scored_by_the_nearest_clean_render():
  asked = glyphs.Attributes("A", "red", "white")
  other = dataclasses.replace(asked, glyph="B", ink="blue")
  task, picture = {**dataclasses.asdict(asked), "prompt": ""}, glyphs.render(asked, 64, 64)
  assert glyph().score(picture, task) == 1 and glyph().score(glyphs.render(other, 64, 64), task) == pytest.approx(1 / 3)
  assert glyph(("ink",)).score(glyphs.render(other, 64, 64), task) == 0
  edit = {"target": dataclasses.asdict(other), "source": dataclasses.asdict(asked), "prompt": ""}
  assert glyph(("glyph", "change")).score(picture, edit) == 0 and glyph(("glyph", "change")).score(glyphs.render(other, 64, 64), edit) == 1
  glyph().check(edit)
  for reward, wrong, message in ((glyph(), {"glyph": "A"}, "which glyph the picture shows"), (glyph(("change",)), task, "is no edit of a glyph"),
                                 (glyph(), {"target": "A"}, "which glyph")):
    with pytest.raises(ValueError, match=message):
      reward.check(wrong)
  with pytest.raises(ValueError, match="parts is"):
    glyph(("shape",))


def test_an_edit_is_scored_by_what_it_leaves_alone():
  rng = np.random.default_rng(0)
  source = rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)
  target = source.copy()
  target[:, :12] = 0
  task, reward = {"sources": (source,), "reference": target}, kept().score
  touched = target.copy()
  touched[:, 30:] = 255 - touched[:, 30:]
  assert reward(target, task) == pytest.approx(1) and reward(source, task) == pytest.approx(1) and reward(touched, task) < 0.5
  noisy = {**task, "reference": np.clip(target.astype(int) + 2, 0, 255).astype(np.uint8)}
  assert kept(tolerance=2).score(target, noisy) == pytest.approx(1)
  for wrong, message in ((noisy, "nothing is left that it should keep"), ({"sources": ()}, "is no edit"), ({"sources": (source,)}, "latent cache"),
                         ({**task, "sources": (source[:40],)}, "cannot be compared")):
    with pytest.raises(ValueError, match=message):
      reward(target, wrong)
  with pytest.raises(ValueError, match="tolerance 256"):
    kept(tolerance=256)


def test_every_reward_can_be_sent_to_a_process_and_is_a_function_of_its_picture():
  picture = ndimage.zoom(PICTURES[4], (16, 16, 1), order=0)
  for reward, task in ((glyph(), dataclasses.asdict(glyphs.Attributes("A", "red", "white"))), (read_text(), {"text": "A", "prompt": ""}),
                       (kept(), {"sources": (picture,), "reference": picture})):
    again = pickle.loads(pickle.dumps(reward.score))
    assert again(picture, task) == reward.score(picture, task)
  assert np.float32(LARGEST) == np.finfo(np.float32).max
