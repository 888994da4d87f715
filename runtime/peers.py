"""The processes of one run, and what happens to the others when one of them is gone.

JAX would let the others wait in a collective for minutes and then abort. Here every process keeps a
connection to the first one: it breaks at once when a process dies, and falls silent when a process
or its machine stops, upon which all others end with one sentence.
"""

import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from typing import NoReturn

from absl import logging

from runtime import parallelism
from runtime.errors import Exit

_BEAT_SECONDS = 5.0
_SILENCE_SECONDS = 40.0
_CONNECT_SECONDS = 60.0
# How long a process waits for a sign that its error follows from the loss of another one.
_WAIT_SECONDS = 1.0
# How long one that has failed lets the others report the same error, before they lose it.
_REPORT_SECONDS = 3.0


class Peers:
  """Watches the other processes in a thread; the first process listens, the others connect to it.

  Args:
    index: the number of this process.
    count: the number of processes.
    host: the name or address of the first process's machine.

  Raises:
    OSError: if the processes cannot reach each other.
  """

  def __init__(self, index: int, count: int, host: str):
    self._index = index
    self._lost = threading.Event()
    self._left = False
    self._sockets: dict[int, socket.socket] = {}
    self._heard: dict[int, float] = {}
    try:
      self._connect(count, host)
    except OSError:
      self.leave()  # else those that are connected would take this process for lost
      raise
    for peer in self._sockets:
      self._heard[peer] = time.monotonic()
    threading.Thread(target=self._watch, name='peers', daemon=True).start()

  def _connect(self, count: int, host: str) -> None:
    secret = parallelism.from_first_process(secrets.randbits(31)).to_bytes(4)
    if self._index > 0:
      port = parallelism.from_first_process(0)
      connection = socket.create_connection((host, port), timeout=_CONNECT_SECONDS)
      connection.sendall(secret + self._index.to_bytes(4))
      self._sockets[0] = connection
      return
    with socket.create_server(('', 0)) as server:
      server.settimeout(_CONNECT_SECONDS)
      parallelism.from_first_process(server.getsockname()[1])
      while len(self._sockets) < count - 1:
        connection, _ = server.accept()
        connection.settimeout(_BEAT_SECONDS)
        with contextlib.suppress(OSError):
          message = connection.recv(8, socket.MSG_WAITALL)
          if len(message) == 8 and message[:4] == secret:
            self._sockets[int.from_bytes(message[4:])] = connection

  def _watch(self) -> None:
    selector = selectors.DefaultSelector()
    for peer, connection in self._sockets.items():
      connection.settimeout(_BEAT_SECONDS)
      selector.register(connection, selectors.EVENT_READ, peer)
    next_beat = time.monotonic()
    while self._sockets and not self._left:
      looked = time.monotonic()
      for key, _ in selector.select(max(0.0, next_beat - looked)):
        peer = key.data
        try:
          message = key.fileobj.recv(64)
        except OSError:
          message = b''
        self._heard[peer] = time.monotonic()
        if b'l' in message:  # it has left: its work is done
          selector.unregister(key.fileobj)
          self._sockets.pop(peer).close()
        elif b'x' in message:  # the others stop because of a process, perhaps this one
          self._end(int(message[message.index(b'x') + 1 :].split(b';')[0]), 'is gone')
        elif not message:
          self._end(peer, 'is gone')
      if time.monotonic() < next_beat:  # else every beat would be answered by one
        continue
      next_beat = time.monotonic() + _BEAT_SECONDS
      self._send(b'b')
      for peer in list(self._sockets):
        # Measured from before the look: a process that was stopped since then has messages to read.
        if looked - self._heard[peer] > _SILENCE_SECONDS:
          self._end(peer, f'has been silent for {_SILENCE_SECONDS:.0f} s')

  def _send(self, message: bytes) -> None:
    for connection in list(self._sockets.values()):
      with contextlib.suppress(OSError):  # what is broken is noticed by reading
        connection.sendall(message)

  def _end(self, peer: int, what: str) -> None:
    if self._left:
      return
    self._lost.set()
    self._send(b'x%d;' % peer)
    logging.get_absl_handler().flush()
    sys.stderr.flush()
    # The threads of JAX, which notice too, may be in the middle of a line: they write no more.
    stderr = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if peer == self._index:
      reason = (
        f'the other processes of this run have stopped, because process {peer} was silent for '
        f'{_SILENCE_SECONDS:.0f} s: see what stopped it or its machine'
      )
    else:
      reason = (
        f'process {peer} of this run {what}, so process {self._index} stops: see the output of '
        f'that process for the reason'
      )
    command = 'then rerun the same commands, which resume from the last checkpoint.'
    os.write(stderr, f'\nLostProcess: {reason}, {command}\n'.encode())
    os._exit(Exit.LOST_PROCESS)  # whatever threads still wait for that process

  def leave(self) -> None:
    """Tells the others that this process has done its work."""
    self._left = True
    self._send(b'l')

  def await_loss(self) -> None:
    """Does not return if another process is gone, or is seen to be within a second."""
    if self._lost.wait(_WAIT_SECONDS):
      threading.Event().wait()  # the thread reports it and ends this process

  def fail(self, status: int) -> NoReturn:
    """Ends this process, which has reported an error of its own; JAX would wait for the others.

    Args:
      status: what it exits with.
    """
    self._left = True
    # The others may be about to report the same error. JAX aborts them when the first one is gone.
    time.sleep(_REPORT_SECONDS + (_WAIT_SECONDS if self._index == 0 else 0))
    os._exit(status)
