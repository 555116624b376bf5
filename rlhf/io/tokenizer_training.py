"""Training of byte-level BPE tokenizers."""

import threading
from collections.abc import Callable, Iterable, Iterator

from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from rlhf.io.tokenizer_files import EOS, PAD, byte_level

_MAX_CHARACTERS = 10_000  # of a text that training processes at once


def train_backend(texts: Iterable[str], vocab_size: int) -> Backend:
    """Return a byte-level BPE of at most `vocab_size` entries, trained on texts."""
    backend = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    _run_interruptible(lambda: backend.train_from_iterator(_chunks(texts), trainer))
    return backend


def _run_interruptible(work: Callable[[], None]) -> None:
    """Run native code, which delays signals, in a thread, so that the main thread handles them immediately."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # raised again in the waiting thread
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def _chunks(texts: Iterable[str]) -> Iterator[str]:
    """Yield chunks of texts: training takes time quadratic in the length of a run of one character."""
    for text in texts:
        for start in range(0, len(text), _MAX_CHARACTERS):
            yield text[start : start + _MAX_CHARACTERS]
