"""Encodes, decodes and evaluates ListOps expressions, as text and as ids.

An expression is ``[OP argument ... ]`` where an argument is a digit or another
expression and OP is MIN, MAX, MED (median, rounded down) or SM (sum modulo 10).
Ids are fixed, so that they mean the same in every cache and checkpoint.

Source: Nangia and Bowman, "ListOps: A Diagnostic Dataset for Latent Tree
Learning", 2018; Tay et al., "Long Range Arena", 2021, section 2.2.1.
"""

from collections.abc import Iterable

import numpy as np

from spectraformer_jax.registry import check_choice, nearest

PAD = 0
MIN, MAX, MED, SM = 11, 12, 13, 14
CLOSE = 15
CLS = 16

IDS = {
  "<pad>": PAD,
  **{str(digit): digit + 1 for digit in range(10)},
  "[MIN": MIN,
  "[MAX": MAX,
  "[MED": MED,
  "[SM": SM,
  "]": CLOSE,
  "<cls>": CLS,
}
"""The id of each token. ``<cls>`` is for models that put one in front."""

FORMS = ("plain", "lra", "x")

_TEXT_TO_ID = {
  **{token: i for token, i in IDS.items() if 0 < i < CLS},
  "X": CLOSE,
}
_ID_TO_TEXT = {i: token for token, i in IDS.items() if 0 < i < CLS}


def encode(text: str) -> np.ndarray:
  """Returns the ids of one expression in any of its text forms.

  Accepts plain tokens (``[MAX 2 3 ]``), ``X`` for the closing bracket, and the
  binary parentheses of the LRA files, which have no meaning and are dropped.

  Args:
    text: the expression, tokens separated by white space.

  Returns:
    ``[length]`` uint8 ids between 1 and 15, see :data:`IDS`.

  Raises:
    ValueError: if a token is unknown, the text is empty, or its parentheses
      do not balance.

  Example:
    >>> encode("( ( ( [MAX 2 ) 3 ) ] )").tolist()
    [12, 3, 4, 15]
  """
  opening, closing = text.count("("), text.count(")")
  if opening != closing:
    raise ValueError(
      f"parentheses must balance, got {opening} '(' and {closing} ')' in "
      f"{_shorten(text)}."
    )
  raw = np.frombuffer(text.encode("utf-8", "replace"), np.uint8)
  nesting = np.cumsum(raw == ord("("), dtype=np.int32)
  nesting -= np.cumsum(raw == ord(")"), dtype=np.int32)
  if nesting.min(initial=0) < 0:
    raise ValueError(
      f"parentheses must balance, got a ')' before its '(' in {_shorten(text)}."
    )
  words = text.replace("(", " ").replace(")", " ").split()
  if not words:
    raise ValueError("text must hold at least one token, got none.")
  try:
    return np.fromiter(
      (_TEXT_TO_ID[word] for word in words), np.uint8, len(words)
    )
  except KeyError as error:
    word = error.args[0]
    raise ValueError(
      f"Unknown ListOps token {_shorten(word)} at position "
      f"{words.index(word)}.{nearest(word[:40], _TEXT_TO_ID)}"
    ) from None


def decode(tokens: Iterable[int], form: str = "plain") -> str:
  """Returns the text of an expression.

  Args:
    tokens: ids between 1 and 15, without padding.
    form: ``"plain"`` (``[MAX 2 3 ]``), ``"x"`` (``[MAX 2 3 X``), or ``"lra"``:
      the left-nested parentheses of the LRA files, which need closing brackets.

  Returns:
    The tokens separated by single spaces.

  Raises:
    ValueError: if `form` or an id is unknown, or `form` is ``"lra"`` and the
      brackets do not match.

  Example:
    >>> decode([12, 3, 4, 15], "lra")
    '( ( ( [MAX 2 ) 3 ) ] )'
  """
  check_choice("form", form, FORMS)
  ids = [int(token) for token in tokens]
  for position, token in enumerate(ids):
    if token not in _ID_TO_TEXT:
      raise ValueError(
        f"tokens must be ids from 1 to {CLOSE}, got {token} at position "
        f"{position}; cut the padding off first."
      )
  if form == "lra":
    return _parenthesise(ids)
  words = [_ID_TO_TEXT[token] for token in ids]
  if form == "x":
    words = ["X" if word == "]" else word for word in words]
  return " ".join(words)


def check_complete(tokens: np.ndarray) -> None:
  """Raises ValueError unless the ids are one complete expression.

  This takes a tenth of the time of :func:`evaluate`.

  Args:
    tokens: ``[length]`` ids between 1 and 15, at least one.

  Example:
    >>> check_complete(encode("[MAX 2 3 ]"))
  """
  opening = (tokens >= MIN) & (tokens <= SM)
  closing = tokens == CLOSE
  depth = np.cumsum(opening.astype(np.int32) - closing, dtype=np.int32)
  if depth[-1] > 0 and depth.min() >= 0:
    raise ValueError(
      f"brackets must balance, got {depth[-1]} operators without a ']'."
    )
  # Of a complete expression, only the last token lies outside all operators.
  outside = np.flatnonzero(depth <= 0)
  if depth[-1] or outside[0] != len(tokens) - 1:
    raise ValueError(
      f"brackets must balance and enclose one expression, it is over at "
      f"position {outside[0]} of {len(tokens)} tokens."
    )
  hollow = np.flatnonzero(opening[:-1] & closing[1:])
  if len(hollow):
    raise ValueError(
      f"an operator must have an argument, got none at position {hollow[0]}."
    )


def evaluate(tokens: Iterable[int]) -> int:
  """Returns the value of an expression.

  Args:
    tokens: ids with closing brackets (tokeniser ``full``), without padding.

  Returns:
    The value, 0 to 9.

  Raises:
    ValueError: if the ids are not exactly one complete expression.

  Example:
    >>> evaluate(encode("[MED 7 [SM 8 5 ] 1 6 ]"))
    4
  """
  stack: list[tuple[int, list[int]]] = [(PAD, [])]
  for position, token in enumerate(tokens):
    if 1 <= token <= 10:
      stack[-1][1].append(int(token) - 1)
    elif MIN <= token <= SM:
      stack.append((int(token), []))
    elif token == CLOSE and len(stack) > 1 and stack[-1][1]:
      operator, arguments = stack.pop()
      stack[-1][1].append(_apply(operator, arguments))
    else:
      raise ValueError(
        f"tokens must be one complete ListOps expression, got id {token} at "
        f"position {position} where none can stand."
      )
  if len(stack) != 1 or len(stack[0][1]) != 1:
    raise ValueError(
      "tokens must be one complete ListOps expression, got "
      f"{len(stack) - 1} unclosed operators and {len(stack[0][1])} results."
    )
  return stack[0][1][0]


def _apply(operator: int, arguments: list[int]) -> int:
  """Applies an operator to its arguments."""
  if operator == MIN:
    return min(arguments)
  if operator == MAX:
    return max(arguments)
  if operator == SM:
    return sum(arguments) % 10
  ordered = sorted(arguments)
  count = len(ordered)
  return (ordered[(count - 1) // 2] + ordered[count // 2]) // 2


def _parenthesise(ids: list[int]) -> str:
  """Returns the LRA form: one pair of parentheses per argument and bracket."""
  # Arguments so far of the whole text, then of each open operator.
  children = [0]
  opened: list[int] = []  # where the open operators stand in `words`
  words: list[str] = []
  for token in ids:
    word = _ID_TO_TEXT[token]
    if MIN <= token <= SM:
      opened.append(len(words))
      children.append(0)
      words.append(word)
      continue
    if token == CLOSE:
      if not opened:
        raise ValueError("form 'lra' needs matching brackets, got a stray ']'.")
      start = opened.pop()
      words[start] = "( " * (children.pop() + 1) + words[start]
      word += " )"
    children[-1] += 1
    words.append(word + " )" if opened else word)
  if opened:
    raise ValueError(
      f"form 'lra' needs closing brackets, got {len(opened)} operators "
      "without one (tokeniser 'no_close' drops them)."
    )
  return " ".join(words)


def _shorten(text: str) -> str:
  """Returns the start of a text, quoted, for a message."""
  return repr(text if len(text) <= 40 else text[:37] + "...")
