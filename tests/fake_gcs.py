"""A bucket on this machine: as much of Google Cloud Storage's JSON API as is used here.

Objects are held in memory, written whole and never appended to, as in the real one.
gcsfs finds it by STORAGE_EMULATOR_HOST, TensorStore by TENSORSTORE_GCS_HTTP_URL,
array_record by CLOUD_STORAGE_EMULATOR_ENDPOINT.
"""

import base64
import contextlib
import email
import hashlib
import http.server
import json
import threading
import urllib.parse


class Bucket:
  """objects: name -> bytes; written: how often each name was written."""

  def __init__(self):
    self.objects: dict[str, bytes] = {}
    self.written: dict[str, int] = {}
    self.generation: dict[str, int] = {}
    self.lock = threading.Lock()
    self.uploads: dict[str, list] = {}

  def write(self, name: str, data: bytes):
    with self.lock:
      self.objects[name] = data
      self.written[name] = self.written.get(name, 0) + 1
      self.generation[name] = sum(self.written.values())

  def describe(self, name: str) -> dict:
    data = self.objects[name]
    return {
      "kind": "storage#object",
      "bucket": "bucket",
      "name": name,
      "size": str(len(data)),
      "generation": str(self.generation[name]),
      "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(),
      "updated": "2026-01-01T00:00:00.000Z",
      "timeCreated": "2026-01-01T00:00:00.000Z",
    }


@contextlib.contextmanager
def serve():
  """Gives (bucket, environment): the bucket is gs://bucket for who has the latter."""
  bucket = Bucket()

  class Handler(_Handler):
    store = bucket

  class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *_):
      pass  # a client that hung up

  server = Server(("127.0.0.1", 0), Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  url = f"http://127.0.0.1:{server.server_port}"
  environment = {
    "STORAGE_EMULATOR_HOST": url,
    "TENSORSTORE_GCS_HTTP_URL": url,
    "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
    # Asks the real service over gRPC how the bucket is laid out.
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
  }
  try:
    yield bucket, environment
  finally:
    server.shutdown()
    server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
  store: Bucket
  protocol_version = "HTTP/1.1"

  def log_message(self, *_):
    pass

  def answer(self, status: int, body=b"", **headers):
    if not isinstance(body, bytes):
      body = json.dumps(body).encode()
      headers["Content-Type"] = "application/json"
    self.send_response(status)
    self.send_header("Content-Length", str(len(body)))
    for key, value in headers.items():
      self.send_header(key.replace("_", "-"), value)
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(body)

  def parse(self):
    path, _, query = self.path.partition("?")
    query = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    # /storage/v1/b/bucket/o/NAME, with /upload or /download before it
    parts = path.split("/o/", 1)
    return path, query, urllib.parse.unquote(parts[1]) if len(parts) > 1 else None

  def body(self) -> bytes:
    if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
      data = b""
      while size := int(self.rfile.readline().split(b";")[0], 16):
        data += self.rfile.read(size)
        self.rfile.readline()
      self.rfile.readline()
      return data
    return self.rfile.read(int(self.headers.get("Content-Length", 0)))

  def mismatch(self, name: str, query: dict) -> bool:
    wanted = query.get("ifGenerationMatch")
    found = self.store.generation.get(name, 0) if name in self.store.objects else 0
    return wanted is not None and int(wanted) != found

  def do_GET(self):
    path, query, name = self.parse()
    if path.endswith("/b/bucket"):
      return self.answer(200, {"kind": "storage#bucket", "name": "bucket"})
    if name is None:
      return self.list(query)
    if name not in self.store.objects:
      return self.answer(404, {"error": {"code": 404, "message": "Not Found"}})
    generation = str(self.store.generation[name])
    if query.get("ifGenerationNotMatch") == generation:
      return self.answer(304)
    if query.get("alt") != "media":
      return self.answer(200, self.store.describe(name))
    data, status, headers = self.store.objects[name], 200, {}
    if wanted := self.headers.get("Range"):
      first, _, last = wanted.removeprefix("bytes=").partition("-")
      size = len(data)
      start = int(first) if first else max(0, size - int(last))
      stop = min(size, int(last) + 1) if first and last else size
      if start >= size:
        return self.answer(416, Content_Range=f"bytes */{size}")
      data, status = data[start:stop], 206
      headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    return self.answer(status, data, **{"x-goog-generation": generation}, **headers)

  def list(self, query):
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
    names, folders = [], set()
    for name in sorted(self.store.objects):
      if not name.startswith(prefix) or name < query.get("startOffset", ""):
        continue
      if "endOffset" in query and name >= query["endOffset"]:
        continue
      rest = name[len(prefix) :]
      if delimiter and delimiter in rest:
        folders.add(prefix + rest.split(delimiter)[0] + delimiter)
      else:
        names.append(name)
    items = [self.store.describe(name) for name in names]
    self.answer(200, {"items": items, "prefixes": sorted(folders)})

  def do_POST(self):
    path, query, name = self.parse()
    body = self.body()
    if path.startswith("/batch/"):
      return self.batch(body)
    for verb in ("/rewriteTo/", "/moveTo/"):
      if name is not None and verb in name:
        source, _, target = name.partition(verb)
        return self.copied(source, target.split("o/", 1)[1], verb == "/moveTo/")
    kind = query.get("uploadType")
    if kind == "multipart":
      content = self.headers["Content-Type"].encode()
      message = email.message_from_bytes(b"Content-Type: " + content + b"\n\n" + body)
      about, data = message.get_payload()
      name = json.loads(about.get_payload())["name"]
      payload = _raw_part(body, content)
      del data
      return self.stored(name, payload, query)
    if kind == "media":
      return self.stored(query["name"], body, query)
    if kind == "resumable" and "upload_id" not in query:
      upload = str(len(self.store.uploads))
      name = query.get("name") or json.loads(body)["name"]
      self.store.uploads[upload] = [name, b""]
      host = self.headers["Host"]
      url = f"http://{host}{path}?uploadType=resumable&upload_id={upload}"
      return self.answer(200, {}, Location=url)
    return self.upload_part(query, body)

  def do_PUT(self):
    _, query, _ = self.parse()
    self.upload_part(query, self.body())

  def copied(self, source, target, move):
    if source not in self.store.objects:
      return self.answer(404, {"error": {"code": 404, "message": "Not Found"}})
    self.store.write(target, self.store.objects[source])
    resource = self.store.describe(target)
    if move:
      del self.store.objects[source]
      return self.answer(200, resource)
    return self.answer(200, {"done": True, "resource": resource})

  def upload_part(self, query, body):
    upload = self.store.uploads[query["upload_id"]]
    upload[1] += body
    if self.headers.get("Content-Range", "").endswith("/*"):
      return self.answer(308, Range=f"bytes=0-{len(upload[1]) - 1}")
    return self.stored(upload[0], upload[1], query)

  def stored(self, name, data, query):
    if self.mismatch(name, query):
      return self.answer(412, {"error": {"code": 412, "message": "Precondition"}})
    self.store.write(name, data)
    return self.answer(200, self.store.describe(name))

  def do_DELETE(self):
    _, query, name = self.parse()
    if self.mismatch(name, query):
      return self.answer(412, {"error": {"code": 412, "message": "Precondition"}})
    with self.store.lock:
      found = self.store.objects.pop(name, None)
    return self.answer(404 if found is None else 204)

  def batch(self, body):
    boundary = b"fake"
    answers = []
    for line in body.decode().splitlines():
      if line.startswith("DELETE "):
        name = urllib.parse.unquote(
          line.split()[1].partition("?")[0].split("/o/", 1)[1]
        )
        with self.store.lock:
          found = self.store.objects.pop(name, None)
        status = "204 No Content" if found is not None else "404 Not Found"
        answers.append(
          f"--fake\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status}\r\n\r\n"
        )
    text = "\r\n".join(answers).encode() + b"\r\n--" + boundary + b"--\r\n"
    self.answer(200, text, **{"Content-Type": "multipart/mixed; boundary=fake"})


def _raw_part(body: bytes, content: bytes) -> bytes:
  """The second part of a multipart body, byte for byte."""
  boundary = b"--" + content.split(b"boundary=")[1].strip(b"\"'")
  part = body.split(boundary)[2]
  return part.partition(b"\r\n\r\n" if b"\r\n\r\n" in part else b"\n\n")[2].rstrip(
    b"\r\n"
  )
