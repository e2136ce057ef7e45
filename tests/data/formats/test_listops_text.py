import pytest

from spectraformer_jax.data.formats.listops_text import (
  FORMS,
  IDS,
  decode,
  encode,
  evaluate,
)

NESTED = "[MAX 2 [MED 3 4 ] 9 [MIN 1 [SM 5 6 7 ] ] 0 ]"
NESTED_LRA = (
  "( ( ( ( ( ( [MAX 2 ) ( ( ( [MED 3 ) 4 ) ] ) ) 9 ) ( ( ( [MIN 1 ) "
  "( ( ( ( [SM 5 ) 6 ) 7 ) ] ) ) ] ) ) 0 ) ] )"
)


def test_ids_are_fixed():
  assert IDS == {
    **{"<pad>": 0, "0": 1, "1": 2, "2": 3, "3": 4, "4": 5, "5": 6, "6": 7},
    **{"7": 8, "8": 9, "9": 10, "[MIN": 11, "[MAX": 12, "[MED": 13},
    **{"[SM": 14, "]": 15, "<cls>": 16},
  }


def test_all_surface_forms_give_the_same_ids():
  ids = encode(NESTED).tolist()
  assert ids[:6] == [12, 3, 13, 4, 5, 15]
  assert encode(NESTED_LRA).tolist() == ids
  assert encode(NESTED.replace("]", "X")).tolist() == ids


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("text", [NESTED, "[MIN 1 2 ]", "7"])
def test_round_trip(text, form):
  ids = encode(text)
  assert encode(decode(ids, form)).tolist() == ids.tolist()


def test_surface_forms_are_exact():
  ids = encode(NESTED)
  assert decode(ids) == NESTED
  assert decode(ids, "x") == NESTED.replace("]", "X")
  assert decode(ids, "lra") == NESTED_LRA


@pytest.mark.parametrize(
  ("text", "value"),
  [
    ("[MIN 4 2 9 ]", 2),
    ("[MAX 4 2 9 ]", 9),
    ("[MED 4 2 9 ]", 4),
    ("[MED 4 2 9 8 ]", 6),
    ("[MED 2 3 ]", 2),
    ("[MED 9 1 1 8 ]", 4),
    ("[SM 4 2 9 ]", 5),
    ("[SM 5 5 ]", 0),
    ("8", 8),
    (NESTED, 9),
    ("[MED [MAX 1 8 ] [MIN 3 5 ] [SM 9 9 9 ] ]", 7),
  ],
)
def test_values(text, value):
  assert evaluate(encode(text)) == value


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: encode("[MAX 2 [MAZ 3 ] ]"), r"'\[MAZ' at position 2\. Did you"),
    (lambda: encode(" ( ) "), "text must hold at least one token, got none"),
    (lambda: encode("( [MAX 2 3 ]"), r"must balance, got 1 '\(' and 0 '\)'"),
    (
      lambda: decode([1], "latex"),
      "form must be one of 'plain', 'lra', 'x', got 'latex'",
    ),
    (lambda: decode([1, 0]), "from 1 to 15, got 0 at position 1"),
    (lambda: decode([16]), "from 1 to 15, got 16 at position 0"),
    (lambda: decode([11, 2, 3], "lra"), "got 1 operators without one"),
    (lambda: decode([1, 15], "lra"), "got a stray ']'"),
    (lambda: evaluate([11, 2, 3]), "got 1 unclosed operators and 0 results"),
    (lambda: evaluate([1, 2]), "got 0 unclosed operators and 2 results"),
    (lambda: evaluate([]), "got 0 unclosed operators and 0 results"),
    (lambda: evaluate([11, 15]), "got id 15 at position 1"),
    (lambda: evaluate([1, 15]), "got id 15 at position 1"),
    (lambda: evaluate([11, 2, 0, 15]), "got id 0 at position 2"),
  ],
)
def test_errors(call, message):
  with pytest.raises(ValueError, match=message) as caught:
    call()
  assert "\n" not in str(caught.value)
