"""What generated embeddings share: the table they bake, and when it no longer holds."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from sna_core import CodebookEmbedding, LowRankEmbedding
from tests.test_embedding import small


def ordered(**options):
    """Tokens at random positions, with gaps."""
    embedding = small(base=7, ordered=True, **options)
    embedding.set_token_order(torch.randperm(343)[:300])
    return embedding


EMBEDDINGS = {
    "separable": small,
    "low_rank": lambda: LowRankEmbedding(300, 10, rank=4),
    "codebook": lambda: CodebookEmbedding(300, 10),
    "ordered": ordered,
}
embeddings = pytest.mark.parametrize("make", EMBEDDINGS.values(), ids=EMBEDDINGS.keys())


def counted(embedding, monkeypatch):
    """The numbers of rows that each call generates."""
    rows, generate = [], embedding.generate
    monkeypatch.setattr(embedding, "generate", lambda ids: rows.append(ids.numel()) or generate(ids))
    return rows


@embeddings
def test_a_baked_table_is_a_lookup(make, monkeypatch):
    embedding = make().eval()
    rows, ids = counted(embedding, monkeypatch), torch.randint(0, 300, (4, 9))
    with torch.no_grad():
        expected = embedding(ids)
        assert embedding.bake() is embedding
        del rows[:]
        torch.testing.assert_close(embedding(ids), expected)
        assert torch.equal(embedding(ids), F.embedding(ids, embedding.weight))
        assert torch.equal(embedding(ids.int()), embedding(ids))
        assert torch.equal(embedding.table(), embedding.weight)
        assert torch.equal(embedding.materialize(), embedding.weight)
        assert embedding.materialize() is not embedding.weight
    assert rows == []
    assert not any(value.shape == (300, 10) for value in embedding.state_dict().values())
    with torch.no_grad(), pytest.raises(IndexError):
        embedding(torch.tensor([300]))
    with torch.no_grad(), pytest.raises(ValueError, match="expected integers"):
        embedding(torch.zeros(3))


@embeddings
def test_it_bakes_when_as_many_rows_were_generated_as_the_table_has(make, monkeypatch):
    embedding = make().eval()
    rows = counted(embedding, monkeypatch)
    with torch.no_grad():
        for _ in range(5):
            embedding(torch.randperm(300)[:70])
        assert rows == [70, 70, 70, 70, 300]  # the fifth would be beyond it
        embedding(torch.randperm(300)[:70])
    assert len(rows) == 5


@embeddings
@pytest.mark.parametrize(
    "change",
    [
        lambda e: next(e.parameters()).mul_(1.1),
        lambda e: e.load_state_dict(e.state_dict() | {name: p * 1.1 for name, p in e.named_parameters()}),
        lambda e: setattr(e, next(iter(e._parameters)), torch.nn.Parameter(next(e.parameters()) * 1.1)),
        lambda e: e.resize(350),
        lambda e: e.to(torch.bfloat16),
        lambda e: [next(e.train().parameters()).data.mul_(1.1), e.eval()],  # unseen by version counters
        lambda e: setattr(next(e.parameters()), "data", next(e.parameters()).data * 1.1),
    ],
    ids=["in place", "state dict", "replaced", "resized", "dtype", "through data, in training", "data swapped"],
)
def test_a_changed_weight_leaves_the_baked_table_behind(make, change):
    embedding, ids = make().eval(), torch.arange(0, 300, 7)
    with torch.no_grad():
        before = embedding.bake()(ids)
        change(embedding)
        after = embedding(ids)
        torch.testing.assert_close(after, embedding.generate(ids))
        assert embedding.weight.shape[0] == embedding.num_embeddings
        torch.testing.assert_close(embedding.bake()(ids), after)
    assert after.dtype != before.dtype or embedding.num_embeddings != 300 or not torch.allclose(after, before)


@pytest.mark.parametrize("assign", [False, True])
def test_a_changed_order_leaves_the_baked_table_behind(assign):
    embedding, ids = ordered().eval(), torch.arange(0, 300, 7)
    other = torch.randperm(343)[:300]
    for change in (
        lambda: embedding.set_token_order(other),
        lambda: embedding.load_state_dict(embedding.state_dict() | {"token_order": other.flip(0)}, assign=assign),
    ):
        with torch.no_grad():
            before = embedding.bake()(ids)
            change()
            torch.testing.assert_close(embedding(ids), embedding.generate(ids))
            assert not torch.allclose(embedding(ids), before)


@embeddings
def test_a_replica_of_data_parallel_generates(make):
    """It has plain tensors for parameters, and no way to tell when they change; its buffers are buffers."""
    embedding, ids = make().eval(), torch.arange(250)
    replica = embedding._replicate_for_data_parallel()
    for name, parameter in embedding.named_parameters():
        setattr(replica, name, parameter.detach().clone())
    with torch.no_grad():
        for _ in range(2):  # more rows than the table has
            torch.testing.assert_close(replica(ids), embedding.generate(ids))
    assert not replica.is_baked


@embeddings
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_an_optimizer_step_leaves_the_baked_table_behind(make, options):
    embedding, ids = make().eval(), torch.arange(20)
    with torch.no_grad():
        before = embedding.bake()(ids)
    embedding(ids).sum().backward()
    torch.optim.AdamW(embedding.parameters(), lr=0.1, **options).step()  # a fused one changes no version
    with torch.no_grad():
        torch.testing.assert_close(embedding(ids), embedding.generate(ids))
        assert not torch.allclose(embedding(ids), before)


@embeddings
def test_weights_put_below_by_a_parametrization_are_watched_too(make):
    embedding, ids = make().eval(), torch.arange(20)
    name = next(iter(embedding._parameters))

    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones((), dtype=embedding.weight.dtype))

        def forward(self, weight):
            return weight * self.scale

    scaled = Scaled()
    torch.nn.utils.parametrize.register_parametrization(embedding, name, scaled)
    embedding.requires_grad_(False)
    scaled.scale.requires_grad_(True)
    embedding.bake()
    assert embedding(ids).requires_grad  # what is learned is the scale alone
    with torch.no_grad():
        before = embedding.bake()(ids)
        scaled.scale.mul_(1.5)
        torch.testing.assert_close(embedding(ids), embedding.generate(ids))
        assert not torch.allclose(embedding(ids), before)


@embeddings
def test_copies_and_pickles_carry_no_table(make):
    embedding, ids = make().eval(), torch.arange(20)
    with torch.no_grad():
        embedding.bake()
        next(embedding.parameters()).mul_(1.1)
        for copied in (copy.deepcopy(embedding), pickle.loads(pickle.dumps(embedding))):
            assert not copied.is_baked
            torch.testing.assert_close(copied(ids), embedding.generate(ids))


@embeddings
def test_a_table_baked_under_autocast_is_exact(make):
    embedding, ids = make().eval(), torch.arange(20)
    with torch.no_grad():
        expected = embedding(ids)
        with torch.autocast("cpu", torch.bfloat16):
            embedding.bake()
        torch.testing.assert_close(embedding(ids), expected)


def test_reading_the_weight_keeps_the_table():
    embedding = small().eval().bake()
    table = embedding.weight
    assert embedding.weight is table


@embeddings
def test_what_is_learned_is_never_looked_up(make):
    embedding, ids = make(), torch.arange(5)
    with pytest.raises(RuntimeError, match="call eval"):
        embedding.bake()
    embedding.eval().bake()
    assert embedding(ids).requires_grad
    assert embedding.table().requires_grad
    embedding.train()
    assert not embedding.is_baked
    embedding.eval().requires_grad_(False)
    assert not embedding.bake()(ids).requires_grad
    assert not embedding.unbake().is_baked


@embeddings
def test_baking_under_inference_mode_serves_later_gradients(make):
    embedding = make().eval()
    with torch.inference_mode():
        embedding.bake()
        expected = embedding(torch.arange(6))
    embedding.requires_grad_(False)
    scale = torch.ones((), dtype=expected.dtype, requires_grad=True)
    (embedding(torch.arange(6)) * scale).sum().backward()
    torch.testing.assert_close(scale.grad, expected.sum())
