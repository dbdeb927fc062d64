import torch

from fastvit_engine.data.stream.batch import BadSample, Batch, LabelForm, StageSeconds, empty_batch, targets
from fastvit_engine.data.stream.rebatch import rebatch


def _chunk(first: int, size: int) -> Batch:
    numbers = torch.arange(first, first + size)
    images = numbers.to(torch.uint8).view(-1, 1, 1, 1).expand(size, 2, 2, 3).contiguous()
    return Batch(images, numbers, torch.ones(size), [str(n.item()) for n in numbers], numbers.numpy() + 100)


def test_rebatch_keeps_order_and_pads_the_last_batch():
    batches = list(rebatch([_chunk(0, 3), _chunk(3, 5), _chunk(8, 1), _chunk(9, 2)], size=4, pin_memory=False))
    assert [len(batch.keys) for batch in batches] == [4, 4, 4]
    labels = torch.cat([batch.labels for batch in batches])
    images = torch.cat([batch.images for batch in batches])
    weights = torch.cat([batch.weights for batch in batches])
    keys = [key for batch in batches for key in batch.keys]
    assert [seed for batch in batches for seed in batch.seeds] == [*range(100, 111), 0]
    assert labels.tolist() == [*range(11), 0]
    assert weights.tolist() == [1.0] * 11 + [0.0]
    assert keys == [str(n) for n in range(11)] + [""]
    assert torch.equal(images[:, 1, 1, 2], labels.to(torch.uint8))


def test_rebatch_without_remainder_adds_nothing():
    assert [batch.keys for batch in rebatch([_chunk(0, 4)], size=2, pin_memory=False)] == [["0", "1"], ["2", "3"]]


def test_batches_do_not_share_memory_with_chunks():
    chunk = _chunk(0, 2)
    (batch,) = rebatch([chunk], size=2, pin_memory=False)
    chunk.images.fill_(99)
    assert batch.images.max() == 1


def test_a_chunk_may_be_overwritten_when_the_next_one_is_asked_for():
    def chunks():
        chunk = _chunk(0, 3)
        for first in range(0, 12, 3):
            chunk.images.fill_(99)
            for mine, new in zip(chunk[:3], _chunk(first, 3)[:3], strict=True):
                mine.copy_(new)
            yield chunk._replace(keys=[str(first + n) for n in range(3)])

    batches = list(rebatch(chunks(), size=5, pin_memory=False))
    assert torch.cat([batch.images[:, 0, 0, 0] for batch in batches]).tolist() == [*range(12), 0, 0, 0]


def test_what_comes_with_a_chunk_is_counted_once():
    bad = BadSample("k", "u", "has no image")
    chunks = [_chunk(0, 3)._replace(bad=(bad,), seconds=StageSeconds(1, 2, 3)), _chunk(3, 3)]
    first, second, third = rebatch([*chunks, chunks[0]], size=3, pin_memory=False)
    assert (first.bad, second.bad, third.bad) == ((bad,), (), (bad,)) and first.seconds == third.seconds == (1, 2, 3)
    joined, rest = rebatch([chunks[0], chunks[1], chunks[0]], size=8, pin_memory=False)
    assert joined.bad == (bad, bad) and joined.seconds == (2, 4, 6) and rest.seconds == (0, 0, 0)


def test_several_labels_an_image():
    chunk = _chunk(0, 3)._replace(labels=torch.tensor([[4, 1], [0, -1], [2, 3]]))
    first, second = rebatch([chunk], size=2, pin_memory=False)
    assert first.labels.tolist() == [[4, 1], [0, -1]] and second.labels.tolist() == [[2, 3], [-1, -1]]
    assert targets(first.labels, 5).tolist() == [[0, 1, 0, 0, 1], [1, 0, 0, 0, 0]]
    assert empty_batch(2, 1, LabelForm(3)).labels.tolist() == [[-1] * 3] * 2
    assert targets(torch.tensor([3, 1]), 5).tolist() == [3, 1]


def test_rebatch_keeps_probabilities():
    chunk = _chunk(0, 3)._replace(labels=torch.tensor([[0.5, 0.5], [1, 0], [0.25, 0.75]]))
    first, second = rebatch([chunk], size=2, pin_memory=False)
    assert first.labels.tolist() == [[0.5, 0.5], [1, 0]] and second.labels.tolist() == [[0.25, 0.75], [0, 0]]
    assert targets(first.labels, 2) is first.labels


def test_memory_is_used_again_only_when_nobody_holds_the_batch():
    numbered = (_chunk(first, 2) for first in range(0, 200, 2))
    batches = rebatch(numbered, size=2, pin_memory=False)
    kept = next(batches).images
    view = next(batches).images[1:]  # holds its batch, too
    seen = set()
    for number, batch in enumerate(batches, start=2):
        seen.add(batch.images.data_ptr())
        assert batch.images.flatten()[0] == 2 * number
        del batch
    assert len(seen) <= 2
    assert kept.data_ptr() not in seen and view.untyped_storage().data_ptr() not in seen
    assert kept[:, 0, 0, 0].tolist() == [0, 1] and view[:, 0, 0, 0].tolist() == [3]


def test_memory_that_autograd_keeps_is_not_used_again():
    batches = rebatch((_chunk(first, 2) for first in range(0, 20, 2)), size=2, pin_memory=False)
    weight = torch.ones(2, 2, 2, 3, requires_grad=True)
    losses = [(weight * next(batches).images).sum() for _ in range(3)]
    losses[0].backward()
    assert torch.equal(weight.grad[:, 0, 0, 0], torch.tensor([0.0, 1.0]))


def test_memory_grows_with_the_batches_that_are_held():
    batches = list(rebatch((_chunk(first, 2) for first in range(0, 20, 2)), size=2, pin_memory=False))
    assert len({batch.images.data_ptr() for batch in batches}) == 10
