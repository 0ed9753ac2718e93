"""Hear the words of a world: speech in, words out, on this machine, and no audio is kept.

pocketsphinx knows how English sounds and nothing else: it is given a small language, the world's
words and some that stand between them. So whatever is said is taken for words of the world, and
who is heard wrongly says it again.
"""

from __future__ import annotations

import logging
import math
import tempfile
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lipass.errors import LipassError
from lipass.play.world import Words

log = logging.getLogger(__name__)

RATE = 16_000
"""Samples a second: 16 bit, little endian, one channel."""
_LEADING, _BETWEEN = ("a", "the", "room", "world"), ("at", "in", "with", "and")
_LONGEST_S, _PRE_ROLL_S = 8.0, 0.3
# Silence of a browser that takes noise out is digital, which the recogniser mishears: of 140 words
# of a speech synthesiser it got 99 without and 123 with this much noise.
_FLOOR = 30.0
_BACK_OFF = -4.0


class Heard(NamedTuple):
    """What was said: the text, and the world's words in it, the latest of each group."""

    text: str
    words: Words


class Recogniser:
    """Hears one utterance after the other, for everybody, in a thread of its own.

    Args:
        groups: the words of a world.

    Raises:
        LipassError: pocketsphinx is not installed, or knows none of the words.
    """

    def __init__(self, groups: Mapping[str, Sequence[str]]) -> None:
        pocketsphinx = _pocketsphinx()
        self._groups = {name: tuple(group) for name, group in groups.items()}
        model = Path(pocketsphinx.get_model_path()) / "en-us"
        wanted = [*_LEADING, *_BETWEEN, *groups, *_all(groups)]
        sounds = _sounds(model / "cmudict-en-us.dict", wanted)
        known = {name: [w for w in group if w in sounds] for name, group in groups.items()}
        if deaf := [word for word in _all(groups) if word not in sounds]:
            log.warning("how these words sound is not known: %s", ", ".join(deaf))
        if not any(known.values()):
            raise LipassError(
                f"voice needs words of which the sound is known, got {', '.join(_all(groups))}; "
                "use plain English words, or --no-voice"
            )
        with tempfile.TemporaryDirectory() as folder:
            language, lexicon = Path(folder, "words.arpa"), Path(folder, "words.dict")
            language.write_text(language_of({n: g for n, g in known.items() if g}, set(sounds)))
            lexicon.write_text("".join(line for lines in sounds.values() for line in lines))
            self._decoder = pocketsphinx.Decoder(
                hmm=str(model / "en-us"), lm=str(language), dict=str(lexicon), loglevel="FATAL"
            )
        self._noise = np.random.default_rng(0).normal(0, _FLOOR, int(RATE * (_LONGEST_S + 1)))
        self._lock = threading.Lock()

    def hear(self, pcm: bytes) -> Heard:
        """Understand one utterance; takes a tenth of its length."""
        samples = np.frombuffer(pcm, "<i2").astype(np.float64)[: len(self._noise)]
        samples = np.clip(samples + self._noise[: len(samples)], -32768, 32767).astype("<i2")
        with self._lock:
            self._decoder.start_utt()
            self._decoder.process_raw(samples.tobytes(), no_search=False, full_utt=True)
            self._decoder.end_utt()
            found = self._decoder.hyp()
        text = found.hypstr if found else ""
        said = [[w for w in text.split() if w in group] for group in self._groups.values()]
        return Heard(text, tuple(words[-1] for words in said if words))


class Ear:
    """Cuts what one visitor's microphone sends into utterances.

    Raises:
        LipassError: pocketsphinx is not installed.
    """

    def __init__(self) -> None:
        self._ends = _pocketsphinx().Endpointer(sample_rate=RATE)
        self._frame = self._ends.frame_bytes
        before = int(_PRE_ROLL_S / self._ends.frame_length)
        self._before: deque[bytes] = deque(maxlen=before)
        self._rest = bytearray()
        self._said = bytearray()

    def hear(self, pcm: bytes) -> list[bytes]:
        """Listen on; return the utterances that have ended."""
        ended = []
        self._rest += pcm
        while len(self._rest) >= self._frame:
            frame = bytes(self._rest[: self._frame])
            del self._rest[: self._frame]
            spoken = self._ends.process(frame)
            if spoken is None:
                self._before.append(frame)
                continue
            if not self._said:
                self._said += b"".join(self._before)
            self._said += spoken
            if not self._ends.in_speech or len(self._said) >= 2 * RATE * _LONGEST_S:
                ended.append(bytes(self._said))
                self._said.clear()
                self._before.clear()
        return ended


class Voice:
    """What a host hears with: made when somebody speaks first, one utterance at a time.

    Args:
        groups: the words of a world.

    Attributes:
        failure: why nobody can be heard, once that is known.
    """

    def __init__(self, groups: Mapping[str, Sequence[str]]) -> None:
        self._groups = groups
        self.failure = ""
        self._recogniser: Recogniser | None = None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="lipass-play-voice")
        """Who hears somewhere else would hold up the event loop."""

    def hear(self, pcm: bytes) -> Heard:
        """Understand one utterance; called in `thread`.

        Raises:
            LipassError: as `Recogniser` does; it is made once.
        """
        if self.failure:
            raise LipassError(self.failure)
        if self._recogniser is None:
            try:
                self._recogniser = Recogniser(self._groups)
            except LipassError as error:
                self.failure = str(error)
                raise
        return self._recogniser.hear(pcm)

    def close(self) -> None:
        """Hear nothing more."""
        self.thread.shutdown(wait=False, cancel_futures=True)


def _pocketsphinx() -> Any:
    """Import what hears.

    Raises:
        LipassError: it is not installed.
    """
    try:
        import pocketsphinx
    except ImportError:
        raise LipassError(
            "voice needs pocketsphinx, got none; run pip install 'lipass[voice]'"
        ) from None
    return pocketsphinx


def language_of(groups: Mapping[str, Sequence[str]], sounds: set[str]) -> str:
    """Write the language of a world as ARPA text: which word may follow which.

    Room at night in fog: perhaps `a room`, then words of different groups, perhaps with `at`,
    `in`, `with`, `and` in front and the name of their group behind, as in warm light.
    """
    leading = [word for word in _LEADING if word in sounds]
    between = [word for word in _BETWEEN if word in sounds]
    words = [word for group in groups.values() for word in group]
    nouns = [word for word in leading if word not in ("a", "the")]
    follows: dict[str, list[str]] = {"<s>": [*leading, *between, *words]}
    follows |= {word: nouns for word in leading if word not in nouns}
    follows |= {word: [*between, *words] for word in nouns}
    follows |= {w: words + [b for b in between if w == "and" and b != w] for w in between}
    for name, group in groups.items():
        others = [w for other, many in groups.items() if other != name for w in many]
        ends = [*between, *others, "</s>"]
        follows |= {word: [*([name] if name in sounds else []), *ends] for word in group}
        if name in sounds and name not in follows:
            follows[name] = ends
    every = sorted({*follows, *(word for many in follows.values() for word in many)})
    pairs = [(w, n, -math.log10(len(many))) for w, many in follows.items() for n in many]
    even = -math.log10(len(every))
    lines = ["\\data\\", f"ngram 1={len(every)}", f"ngram 2={len(pairs)}", "", "\\1-grams:"]
    for word in every:
        back_off = 0.0 if word == "</s>" else _BACK_OFF
        lines.append(f"{-99.0 if word == '<s>' else even:.4f} {word} {back_off:.4f}")
    lines += ["", "\\2-grams:", *(f"{p:.4f} {word} {after}" for word, after, p in pairs)]
    return "\n".join([*lines, "", "\\end\\", ""])


def _sounds(dictionary: Path, words: Sequence[str]) -> dict[str, list[str]]:
    """Find the lines of words in a dictionary; a word has several where it has several sounds."""
    wanted = set(words)
    found: dict[str, list[str]] = {}
    with dictionary.open(encoding="utf-8") as lines:
        for line in lines:
            word = line.partition(" ")[0].partition("(")[0]
            if word in wanted:
                found.setdefault(word, []).append(line)
    return found


def _all(groups: Mapping[str, Sequence[str]]) -> list[str]:
    return [word for group in groups.values() for word in group]
