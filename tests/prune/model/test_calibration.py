"""The text that a model is calibrated on."""

import numpy as np
import pytest

import slidejax as sj


def test_batches_have_one_shape():
    assert [
        batch.shape for batch in sj.prune.Calibration(np.zeros((9, 5), np.int32)).as_batches()
    ] == 3 * [(3, 5)]


def test_a_text_that_is_too_short():
    with pytest.raises(ValueError, match="too few"):
        sj.prune.cut([1], 2, 4)
