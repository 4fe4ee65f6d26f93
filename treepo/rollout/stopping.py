"""Decides where a trajectory ends: boxed answer, end of sequence, response limit, depth, repetition.

The rules look at the whole response at every segment boundary.

- Boxes are looked for in the concatenated texts of single tokens, so the segment boundaries make no
  difference. (A character that a byte-level tokenizer splits is never part of a box.)
- Repetition is counted in tokens, and only a run that ends at the boundary counts: a model that has left a
  loop goes on.

The official code looks at the last segment only. For repetition it takes any 32 characters and counts
overlapping occurrences, so a table rule of 39 dashes ends a path.

The engine holds the same `StopRule` as the driver, so that it can end a request of many segments early.
"""

import re
from collections.abc import Callable

import numpy as np

from treepo.config.sampling import RepetitionConfig, SamplingConfig
from treepo.rollout.boxed import BoxScan
from treepo.tree import Stop

# Of a token's text: it is known; a box may begin in it; it ends with a backslash; a box may go on with it.
_KNOWN, _BEGINS, _OPENS, _CONTINUES = 1, 2, 4, 8
_BEGINNING = re.compile(r"\\(?:boxed|fbox|(?:b|bo|box|boxe|f|fb|fbo)\Z)")
_CONTINUATION = re.compile(r"boxed|fbox|(?:|b|bo|box|boxe|f|fb|fbo)\Z")


class StopRule:
    """Applies the stops of one sampling configuration. Picklable if `decode` is.

    decode: token ids to text. Called with the tokens of a response so far (int32 [T], without the prompt, no
    end token yet), it says whether the response ends here.
    """

    def __init__(self, config: SamplingConfig, decode: Callable[[np.ndarray], str]) -> None:
        self._config = config
        self._decode = decode
        self._texts = np.empty(0, dtype=object)  # by token id; None: not decoded yet
        self._marks = np.empty(0, dtype=np.uint8)  # by token id: what its text has for a search

    def __call__(self, response: np.ndarray) -> bool:
        if self._config.stops.boxed == "end" and self.scan(BoxScan(), response).found:
            return True
        return self._repeats(response)

    def scan(self, before: BoxScan, tokens: np.ndarray) -> BoxScan:
        """Continue the search for a box in a response over further tokens (int32 [T])."""
        if before.found or self._config.stops.boxed == "off" or not len(tokens):
            return before
        marks = self._marks_of(tokens)
        if before.idle:
            first = _first_box(marks)
            if first is None:
                return before
            tokens = tokens[first:]
        return before.extend("".join(self._texts[tokens].tolist()))

    def classify(self, response: np.ndarray, box: BoxScan, eos: bool) -> Stop | None:
        """Why the response (int32 [T]) ends here; None if it goes on.

        box: the scan of the whole response. eos: whether the last token ends the sequence.
        """
        config, stops = self._config, self._config.stops
        if stops.repetition.check == "first" and self._repeats(response):
            return Stop.REPETITION
        if box.found and (eos or stops.boxed == "end"):
            return Stop.BOXED
        if eos:
            return Stop.EOS
        if len(response) >= config.max_response_tokens:
            return Stop.LIMIT
        if config.mode == "tree" and len(response) > (config.max_depth - 1) * config.segment_tokens:
            return Stop.DEPTH
        if stops.repetition.check == "last" and self._repeats(response):
            return Stop.REPETITION
        return None

    def _repeats(self, response: np.ndarray) -> bool:
        repetition = self._config.stops.repetition
        return repetition.check != "off" and repeats(response, repetition)

    def _marks_of(self, tokens: np.ndarray) -> np.ndarray:
        """The marks of each token's text, uint8 [T]; all texts are known then."""
        try:
            marks = self._marks[tokens]
        except IndexError:
            further = 1 << int(tokens.max()).bit_length()
            self._texts = np.append(self._texts, np.empty(further - len(self._texts), dtype=object))
            self._marks = np.append(self._marks, np.zeros(further - len(self._marks), dtype=np.uint8))
            marks = self._marks[tokens]
        if marks.all():
            return marks
        for token in set(tokens[marks == 0].tolist()):
            text = self._texts[token] = self._decode(np.array([token], dtype=np.int32))
            self._marks[token] = _marks_in(text)
        return self._marks[tokens]


def _marks_in(text: str) -> int:
    begins, opens = _BEGINNING.search(text) is not None, text.endswith("\\")
    return _KNOWN | _BEGINS * begins | _OPENS * opens | _CONTINUES * (_CONTINUATION.match(text) is not None)


def _first_box(marks: np.ndarray) -> int | None:
    """The first token from which a text may have a box, or the beginning of one at its end; None if none.

    marks: of the tokens, uint8 [T]. Backslashes right before it are included: every other one is escaped.
    """
    opens = marks & _OPENS
    begins = marks & _BEGINS
    begins[:-1] |= opens[:-1] & (marks[1:] >> 1)  # _CONTINUES, moved to where _OPENS is
    begins[-1] |= opens[-1]
    first = int((begins > 0).argmax())
    if not begins[first]:
        return None
    while first and opens[first - 1]:
        first -= 1
    return first


def repeats(tokens: np.ndarray, config: RepetitionConfig) -> bool:
    """Whether the last `window_tokens` tokens of a response (int32 [T]) occur in it `count` times without
    overlap.

    If these last tokens have fewer than `min_distinct` distinct ones, occurrences count only while each is
    within a window of the next: dashes in ten tables are not a loop, an endless row of dashes is.
    """
    window, count = config.window_tokens, config.count
    if len(tokens) < window * count:
        return False
    last = tokens[-window:]
    starts = np.flatnonzero(tokens[: len(tokens) - window + 1] == last[0])
    for offset in range(1, window):
        if len(starts) < count:
            return False
        starts = starts[tokens[starts + offset] == last[offset]]
    if len(starts) < count:
        return False
    sparse = len(np.unique(last)) < config.min_distinct
    occurrences, begin = 0, len(tokens)
    for start in starts[::-1].tolist():
        if start > begin - window:
            continue
        if sparse and start < begin - 2 * window:
            break
        occurrences, begin = occurrences + 1, start
    return occurrences >= count
