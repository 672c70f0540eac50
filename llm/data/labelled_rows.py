"""Labelled samples as rows: each whole, a document of its own, its labels at its first token.

Unlike a sample whose tokens are predicted, one of n tokens takes n positions.

Shapes: L labels of a sample, n positions in use.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from llm.batch import IGNORE
from llm.data.augment import Augmentation, draw_of
from llm.data.labels import LabelsEntry, MaxLength
from llm.data.packed import Packed, Shortened
from llm.data.rows import Row, RowTargets
from llm.data.samples import SampleSource, digest_of
from llm.errors import UserError

PREDICTION = "prediction"
"""The targets of rows with labels: 0 at the first token of each labelled sample."""


def value_of(label: int) -> str:
    """The values that hold a label: it, or NaN where it is missing, at the first token of each sample, 0 elsewhere."""
    return f"{PREDICTION}.{label}"


class LabelledRows(Packed):
    """Rows of `seq_len` positions of the labelled samples of a source."""

    most = "train.seq_len"
    extra = 0
    cut_where = "cut after their beginning"

    def __init__(
        self,
        source: SampleSource,
        seq_len: int,
        seed: int,
        *,
        together: bool = True,
        max_length: MaxLength = "error",
        given: str = "",
        causal: bool = False,
        augmentation: Augmentation | None = None,
        encode: Callable[[str], NDArray[np.int64]] | None = None,
        max_length_key: str = "prediction.max_length",
    ) -> None:
        """max_length_key: of the config, that says max_length; causal: texts are read from left to right; augmentation:
        how a text is written anew each time it is read, for rows of one sample each; encode: the tokens of such a text.

        UserError naming file and row where a sample does not fit and max_length is `error`, or where none fits.
        """
        self.max_length_key = max_length_key
        super().__init__(
            source, seq_len, seed, target=PREDICTION, together=together, max_length=max_length, given=given
        )
        assert source.manifest.labels is not None
        self.labels: LabelsEntry = source.manifest.labels
        self.causal, self.augmentation, self.encode = causal, augmentation, encode
        self.features: int | None = source.manifest.features
        """Values of a position, of rows of values."""
        self.values = tuple(value_of(label) for label in range(len(self.labels.names)))
        self._places: NDArray[np.float32] | None = None
        if augmentation is not None:
            self.fingerprint = digest_of([self.fingerprint, augmentation.name, augmentation.fingerprint])

    def name_classes(self, names: tuple[str, ...]) -> None:
        """Give classes their places in the model, those of their names; all of the source's must be among them."""
        self._places = np.array([names.index(name) for name in self.labels.classes], dtype=np.float32)

    def read(self, k: int, epoch: int) -> Row:
        tokens, starts, at = [], [], 0
        features: list[NDArray[np.float32]] = []
        of_labels = [], []  # type: tuple[list[NDArray[np.float32]], list[float]]
        for item in self.items(k, epoch).tolist():
            sample, n = self.source.sample(item), int(self._kept[item, 0])
            assert sample.labels is not None
            tokens.append(self._tokens(item, epoch, sample.tokens[:n], sample.text))
            if sample.features is not None:
                features.append(sample.features[:n])
            starts.append(at)
            of_labels[0].append(self._placed(sample.labels))
            of_labels[1].append(float(sample.weights[0]))
            at += len(tokens[-1])
        labels_SL, weights_S = np.stack(of_labels[0]), np.array(of_labels[1], dtype=np.float32)
        first = np.array(starts, dtype=np.int64)
        labels, weights = np.full(at, IGNORE, dtype=np.int64), np.zeros(at, dtype=np.float32)
        labels[first], weights[first] = 0, weights_S
        values = {name: np.zeros(at, dtype=np.float32) for name in self.values}
        for number, of_label in enumerate(values.values()):
            of_label[first] = labels_SL[:, number]
        plain = bool((weights_S == 1).all())
        targets = {PREDICTION: RowTargets(labels, None if plain else weights)}
        read = np.concatenate(features) if features else None
        return Row(np.concatenate(tokens), targets, first, values, causal=self.causal, features=read)

    def labels_kept(self) -> NDArray[np.float32]:
        """(samples, L) the labels of what rows hold, as they are stored, in the order of the source."""
        return self.source.labels()[self.samples_in_rows()]

    def features_kept(self) -> list[NDArray[np.float32]]:
        """Of rows of values, those of each sample that rows hold, (n, F), as far as they hold it."""
        return [self.source.features(item)[: int(self._kept[item, 0])] for item in self.samples_in_rows().tolist()]

    def _placed(self, labels_L: NDArray[np.float32]) -> NDArray[np.float32]:
        if self._places is None or np.isnan(labels_L[0]):
            return labels_L
        return self._places[labels_L.astype(np.int64)]

    def _tokens(self, item: int, epoch: int, tokens: NDArray[np.int64], text: str | None) -> NDArray[np.int64]:
        """Those of a sample as they are read in an epoch: a text written anew that is longer than a row, or that the
        tokenizer has no ids for, is read as it was.
        """
        if self.augmentation is None:
            return tokens
        assert text is not None and self.encode is not None
        written = self.augmentation.written(text, draw_of(self.seed, epoch, item))
        try:
            found = self.encode(written)
        except UserError:
            return tokens
        return found if len(found) <= self.seq_len else tokens

    def _most_of(self, item: int) -> int:
        return self.seq_len

    def _is_bare(self, cut: Shortened) -> bool:
        return False

    @staticmethod
    def _positions(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        return tokens.sum(1)
