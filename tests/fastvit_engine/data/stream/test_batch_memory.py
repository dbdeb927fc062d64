import threading

import numpy as np
import pytest
import torch

from fastvit_engine.data.stream.batch_memory import BatchMemory, SharedMemory

HOLDERS = {
    "tensor": lambda images: images,
    "slice": lambda images: images[1:],
    "shape": lambda images: images.flatten(1).T,
    "storage": lambda images: images.untyped_storage(),
    "detached": lambda images: images.detach(),
    "array": lambda images: images.numpy(),
    "part of an array": lambda images: images.numpy()[1:, ::2],
    "bytes": lambda images: memoryview(images.numpy()),
    "DLPack, PyTorch": torch.from_dlpack,
    "DLPack, NumPy": np.from_dlpack,
    "autograd": lambda images: torch.ones(2, 4, 4, 3, requires_grad=True) * images,
}


@pytest.mark.parametrize("holder", HOLDERS.values(), ids=HOLDERS)
def test_whatever_refers_to_images_keeps_their_memory_from_being_used_again(holder):
    private, shared = BatchMemory(False, 2), SharedMemory(1, 2, (4, 4, 3))
    slot = shared.take()
    held = holder(private.reserve(2, 4, 4, 3)), holder(shared.images(slot, 0, 2, (4, 4, 3)))
    first = private._kept[0].ctypes.data
    shared.release(slot)
    for _ in range(5):
        assert private.reserve(2, 4, 4, 3).data_ptr() != first
        other = shared.take()
        assert other != slot
        shared.release(other)
    del held
    assert private.reserve(2, 4, 4, 3).data_ptr() == first
    assert slot in (shared.take(), shared.take())


def test_a_thread_keeps_the_images_that_it_works_on():
    memory, go = BatchMemory(False, 2), threading.Event()
    thread = threading.Thread(target=lambda images: go.wait() and images.sum(), args=[memory.reserve(2, 3)])
    thread.start()
    assert memory.reserve(2, 3).data_ptr() != memory._kept[0].ctypes.data
    go.set()
    thread.join()
    del thread
    assert memory.reserve(2, 3).data_ptr() == memory._kept[0].ctypes.data


def test_images_outlive_their_memory():
    memory = SharedMemory(1, 2, (4, 4, 3))
    images = memory.images(memory.take(), 0, 2, (4, 4, 3)).fill_(7)
    del memory
    assert images.eq(7).all()
