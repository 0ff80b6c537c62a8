"""What a run prints beside its own lines."""

import warnings

import lightning.pytorch as lightning

from moezoo_train.measure.progress import quieted
from moezoo_train.optim import schedule


def test_our_warnings_are_lines_without_the_place_in_the_code():
    before = warnings.formatwarning
    text = "schedule: the learning rate rises"
    with quieted(), quieted():
        said = warnings.formatwarning(text, UserWarning, schedule.__file__, 7)
        assert said == f"moezoo: warning: {text}\n"
        for category, file in (
            (FutureWarning, schedule.__file__),
            (UserWarning, lightning.__file__),
            (UserWarning, "/somewhere/moezoo/script.py"),
        ):
            expected = before(text, category, file, 7)
            assert warnings.formatwarning(text, category, file, 7) == expected
    assert warnings.formatwarning is before


def test_lightning_need_not_recommend_to_sum_what_is_summed():
    said = "It is recommended to use `self.log('{}', ..., sync_dist=True)` when logging on epoch"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with quieted():
            for name in ("step", "val/loss", "test/bits_per_byte", "train/mine"):
                warnings.warn(said.format(name), UserWarning, stacklevel=1)
    assert [str(each.message) for each in caught] == [said.format("train/mine")]
