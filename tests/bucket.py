"""A server on this machine that speaks the protocol of Google Cloud Storage, for tests."""

import contextlib
import functools
import http.server
import logging
import os
import threading
import urllib.parse

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.storage import Storage

NAME = "bucket"
logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)  # it logs every object that is asked for and is not there
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # gcsfs reads it when it is imported: it would ask for credentials at every call
ROOT = f"gs://{NAME}/"


class Bucket:
  """An empty bucket at `ROOT`, for processes that have its `environment`; `refuse_every=10` refuses one request in ten, `is_down` all."""

  def __init__(self, refuse_every=0):
    self.refuse_every, self.is_down, self.num_requests, self.num_refused = refuse_every, False, 0, 0
    self._storage, self._lock = Storage(use_memory_fs=True), threading.Lock()
    buckets.create_bucket(NAME, self._storage)
    self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, self))
    self.address = f"http://127.0.0.1:{self._server.server_port}"
    self.environment = {"STORAGE_EMULATOR_HOST": self.address, "TENSORSTORE_GCS_HTTP_URL": self.address}
    threading.Thread(target=self._server.serve_forever, daemon=True).start()

  def names(self):
    """Names of the objects."""
    with self._lock:
      return sorted(item["name"] for item in self._storage.get_file_list(NAME)[0])

  def download(self, folder):
    """Writes all objects into a folder of this machine."""
    for name in self.names():
      path = folder / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(self._storage.get_file(NAME, name))

  def close(self):
    """Ends the server."""
    self._server.shutdown()
    self._server.server_close()

  @contextlib.contextmanager
  def turn(self):
    """Whether a request is refused; requests are answered one after the other."""
    with self._lock:
      self.num_requests += 1
      refused = self.is_down or bool(self.refuse_every) and self.num_requests % self.refuse_every == 0
      self.num_refused += refused
      yield refused


class _Handler(server.RequestHandler):
  """The emulator's, which refuses when it is told to, and tells an object's generation with its content: TensorStore keeps what has not changed."""

  def __init__(self, bucket, *args):
    self._bucket, self._generation = bucket, None
    super().__init__(bucket._storage, *args)

  def handle_one_request(self):
    with contextlib.suppress(ConnectionError):
      super().handle_one_request()

  def __getattribute__(self, name):
    if not name.startswith("do_"):
      return super().__getattribute__(name)
    return functools.partial(self._answer, super().__getattribute__(name))

  def _answer(self, answer):
    with self._bucket.turn() as refused:
      if "/moveTo/" in self.path:  # which it does not know; copied and deleted is as good
        self.send_error(400)
      elif refused:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_error(503)
      elif self._is_unchanged():
        self.send_response(304)
        self.end_headers()
      else:
        answer()

  def _is_unchanged(self):
    """Notes the generation of the object whose content is asked for; whether the one who asks has that."""
    url = urllib.parse.urlparse(self.path)
    query = urllib.parse.parse_qs(url.query)
    if self.command == "GET" and query.get("alt") == ["media"]:
      with contextlib.suppress(NotFound):
        self._generation = self.storage.get_file_obj(NAME, urllib.parse.unquote(url.path.partition("/o/")[2]))["generation"]
    return self._generation is not None and query.get("ifGenerationNotMatch") == [self._generation]

  def end_headers(self):
    if self._generation is not None:
      self.send_header("x-goog-generation", self._generation)
    super().end_headers()

  def log_message(self, *_):
    pass
