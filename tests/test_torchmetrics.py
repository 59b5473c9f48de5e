"""The measures as metrics of torchmetrics give the numbers of our own, reset, and add up over processes."""

import copy
import pickle

import gloo
import lightning
import pytest
import torch
from strategies import generator
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection

import cgc_reg
from cgc_reg.torchmetrics import Consistency, ContentHeatmap

QUERY, KEY, MASKS = torch.rand(3, 11, 5, 5, generator=generator(0))
BATCHES = [slice(0, 3), slice(3, 8), slice(8, 11)]
VALUES = ("loss", "positive_similarity", "negative_similarity", "margin", "blank_share", "count", "groups")
ON_OBJECT = ("content_heatmap", "object_coverage", "blank_share", "no_object_share", "count")


def collections():
    """Both of theirs, with an update and with what ours come to of the same maps."""
    consistency = MetricCollection({name: Consistency(name, batch_size=4) for name in VALUES})
    content = MetricCollection({name: ContentHeatmap(name) for name in ON_OBJECT})
    return [
        (consistency, cgc_reg.Consistency(batch_size=4), (QUERY, KEY)),
        (content, cgc_reg.ContentHeatmap(), (QUERY, MASKS > 0.5)),
    ]


def floats(found):
    return {name: float(value) for name, value in found.items()}


@pytest.mark.parametrize("which", [0, 1])
def test_values_are_those_of_our_own_whatever_the_batches(which):
    theirs, ours, maps = collections()[which]
    for batch in BATCHES:
        theirs.update(*(each[batch] for each in maps))
        ours.update(*(each[batch] for each in maps))
        assert floats(theirs.compute()) == pytest.approx(ours.compute(), rel=1e-6, nan_ok=True)
    theirs.reset()
    theirs.update(*maps)
    assert floats(theirs.compute()) == pytest.approx(ours.compute(), rel=1e-6)


@pytest.mark.parametrize("which", [0, 1])
def test_a_collection_takes_in_each_batch_once(which, monkeypatch):
    theirs, ours, maps = collections()[which]
    theirs.update(*maps)  # the first one finds out which share their states
    calls = []
    update = type(ours).update
    monkeypatch.setattr(type(ours), "update", lambda *given, **more: calls.append(1) or update(*given, **more))
    theirs.update(*maps)
    assert len(calls) == 1


def test_a_collection_keeps_other_settings_apart():
    settings = [(0.5, 4), (0.1, 4), (0.5, 8)]
    theirs = MetricCollection(
        {str(i): Consistency(temperature=tau, batch_size=size) for i, (tau, size) in enumerate(settings)}
    )
    for batch in BATCHES:  # the first one, by which a collection tells which are one, fills no group
        theirs.update(QUERY[batch], KEY[batch])
    for i, (tau, size) in enumerate(settings):
        own = cgc_reg.Consistency(temperature=tau, batch_size=size)
        own.update(QUERY, KEY)
        assert float(theirs.compute()[str(i)]) == pytest.approx(own.compute()["loss"], rel=1e-6)


def test_a_call_returns_the_value_of_its_batch_and_takes_it_in():
    metric, whole = Consistency("margin", batch_size=4), Consistency("margin", batch_size=4)
    for batch in BATCHES:
        own = cgc_reg.Consistency(batch_size=4)
        own.update(QUERY[batch], KEY[batch])
        assert float(metric(QUERY[batch], KEY[batch])) == pytest.approx(own.compute()["margin"], nan_ok=True)
    whole.update(QUERY, KEY)
    torch.testing.assert_close(metric.compute(), whole.compute())


def test_what_is_merged_and_loaded_is_counted_with_what_follows():
    images, masks = torch.cat([QUERY] * 3), torch.cat([MASKS > 0.5] * 3)
    whole, first, second = (ContentHeatmap() for _ in range(3))
    whole.update(images, masks)
    first.update(QUERY, MASKS > 0.5)
    second.update(QUERY, MASKS > 0.5)
    first.merge_state(second)
    first.update(QUERY, MASKS > 0.5)
    torch.testing.assert_close(first.compute(), whole.compute())
    loaded = ContentHeatmap("count")
    loaded.persistent(True)
    second.persistent(True)
    loaded.load_state_dict(second.state_dict())
    loaded.update(QUERY, MASKS > 0.5)
    assert float(loaded.compute()) == 2 * len(QUERY)


def test_a_collection_gives_each_its_own_keywords():
    both = MetricCollection([Consistency("margin", batch_size=4), ContentHeatmap()])
    both.update(query=QUERY, key=KEY, heatmaps=QUERY, masks=MASKS > 0.5)
    alone = ContentHeatmap()
    alone.update(QUERY, MASKS > 0.5)
    torch.testing.assert_close(both.compute()["ContentHeatmap"], alone.compute())


def test_metrics_are_copied_and_pickled_with_what_they_have_seen():
    metric = Consistency("loss", batch_size=4)
    metric.update(QUERY[:6], KEY[:6])
    for twin in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        twin.update(QUERY[6:], KEY[6:])
        own = cgc_reg.Consistency(batch_size=4)
        own.update(QUERY, KEY)
        assert float(twin.compute()) == pytest.approx(own.compute()["loss"])


def test_unknown_values_are_refused():
    with pytest.raises(ValueError, match=r"`value` must be one of 'loss'.*got 'losses'"):
        Consistency("losses")
    with pytest.raises(ValueError, match=r"`value` must be one of 'content_heatmap'.*got 'content'"):
        ContentHeatmap("content")


def work(rank):
    metric, own = Consistency("loss", batch_size=4), cgc_reg.Consistency(batch_size=4)
    share = slice(0, 7) if rank == 0 else slice(7, 11)
    for each in (metric, own):
        each.update(QUERY[share], KEY[share])
    return {"theirs": metric.compute(), "ours": own.compute()["loss"]}


def test_processes_add_up_as_with_our_own(tmp_path):
    for found in gloo.run(work, 2, tmp_path):
        assert float(found["theirs"]) == pytest.approx(found["ours"])


class Logged(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.measures = MetricCollection(
            {f"val/{name}": Consistency(name, batch_size=4) for name in ("loss", "margin")}
        )

    def validation_step(self, batch, _):
        self.measures.update(*batch)
        self.log_dict(self.measures)


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning")
def test_lightning_logs_and_resets_the_objects(tmp_path):
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    loader = DataLoader(list(zip(QUERY, KEY, strict=True)), 3)
    expected = cgc_reg.Consistency(batch_size=4)
    expected.update(QUERY, KEY)
    module = Logged()
    for _ in range(2):
        (found,) = trainer.validate(module, loader, verbose=False)
        assert found == pytest.approx({f"val/{name}": expected.compute()[name] for name in ("loss", "margin")})
