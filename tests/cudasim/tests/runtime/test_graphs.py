"""Stream capture and CUDA graphs: through PyTorch, and the calls themselves."""

import contextlib
import ctypes
import re

import pytest
import torch

SUCCESS, ILLEGAL_STATE, UNSUPPORTED, INVALIDATED, MERGE, UNJOINED, IMPLICIT, CAPTURED_EVENT = (
    0,
    401,
    900,
    901,
    902,
    904,
    906,
    907,
)
GLOBAL, THREAD_LOCAL, RELAXED = 0, 1, 2
NONBLOCKING = 1


def graph_of(function, *args):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(*args)
    return graph, out


def replay(graph):
    graph.replay()
    torch.cuda.synchronize()


# ---- through PyTorch
def test_nothing_is_computed_before_the_first_replay():
    x = torch.ones(4, device="cuda")
    graph, y = graph_of(lambda: (x * 2 + 1).exp().log())
    assert y.isnan().all()
    graph.replay()
    torch.testing.assert_close(y.cpu(), torch.full((4,), 3.0))
    x.copy_(torch.arange(4.0))
    graph.replay()
    torch.testing.assert_close(y.cpu(), torch.arange(4.0) * 2 + 1)


def test_in_place_work_happens_at_replay_only():
    x = torch.zeros(3, device="cuda")
    graph, _ = graph_of(lambda: x.add_(1))
    assert x.tolist() == [0, 0, 0]
    for _ in range(3):
        graph.replay()
    assert x.tolist() == [3, 3, 3]


def test_kernels_with_their_arguments_by_value(ops):
    a, b = torch.randn(1000, device="cuda"), torch.randn(1000, device="cuda")
    graph, y = graph_of(lambda: ops.add(ops.add(a, b), b))
    assert y.isnan().all()
    for _ in range(2):
        a.normal_(), b.normal_()
        graph.replay()
        torch.testing.assert_close(y, a + b + b)


def test_lists_indices_and_scalars():
    x, i = torch.arange(12.0, device="cuda").view(3, 4), torch.tensor([2, 0], device="cuda")

    def work():
        parts = torch.split(x, 2, dim=1)
        torch._foreach_mul_(list(parts), 2.0)
        return torch.cat([parts[1], parts[0]], 1)[i], torch.topk(x, 2).indices, x.sum() * torch.tensor(3.0)

    graph, (y, top, total) = graph_of(work)
    assert x.sum() == 66
    graph.replay()
    assert x.sum() == 132
    assert total.item() == 396
    assert top.tolist() == [[3, 2]] * 3
    assert y.tolist() == [[20, 22, 16, 18], [4, 6, 0, 2]]


def test_random_numbers_go_on_from_replay_to_replay():
    x = torch.ones(50, device="cuda")
    graph, (noise, dropped) = graph_of(lambda: (torch.randn(50, device="cuda"), torch.rand_like(x)))
    torch.manual_seed(5)
    expected = [(torch.randn(50, device="cuda"), torch.rand_like(x)) for _ in range(2)]
    torch.manual_seed(5)
    for n, d in expected:
        graph.replay()
        assert torch.equal(noise, n)
        assert torch.equal(dropped, d)


def test_copies_to_and_from_pinned_memory():
    host, back, x = torch.arange(4.0).pin_memory(), torch.zeros(4).pin_memory(), torch.zeros(4, device="cuda")

    def work():
        x.copy_(host, non_blocking=True)
        back.copy_(x * 2, non_blocking=True)

    graph, _ = graph_of(work)
    assert back.tolist() == [0] * 4
    host += 1
    graph.replay()
    assert back.tolist() == [2, 4, 6, 8]


@pytest.mark.parametrize(
    ("work", "why"),
    [
        (lambda x: x.sum().item(), "values"),
        (lambda x: x.nonzero(), "values"),
        (lambda x: x[x > 0], "mask"),
        (lambda x: torch.cuda.synchronize(), "cudaDeviceSynchronize"),
        (lambda x: torch.cuda.current_stream().synchronize(), "cudaStreamSynchronize"),
        (lambda x: x.cpu(), "pinned"),
        (lambda x: x.copy_(torch.ones(4)), "pinned"),
    ],
)
def test_what_a_gpu_would_wait_for_is_refused(work, why):
    x = torch.ones(4, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError) as raised, torch.cuda.graph(graph):
        work(x)
    first = raised.value.__context__ or raised.value  # leaving the graph fails too, but the first error says why
    assert re.search("(?s)not permitted when stream is capturing.*" + why, str(first))
    assert (x + 1).tolist() == [2] * 4  # the stream works again


def test_streams_fork_and_join():
    x, side = torch.ones(4, device="cuda"), torch.cuda.Stream()

    def work():
        a = x * 2
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            b = x * 3
        torch.cuda.current_stream().wait_stream(side)
        return a + b

    graph, y = graph_of(work)
    graph.replay()
    assert y.tolist() == [5] * 4


def test_memory_freed_since_the_capture_is_found(ops):
    x = torch.ones(4, device="cuda")
    graph, _ = graph_of(ops.add, x, x)
    del x
    with pytest.raises(RuntimeError, match="illegal memory access"):
        replay(graph)
    x = torch.ones(4, device="cuda")
    graph, _ = graph_of(torch.mul, x, 2)
    del x
    with pytest.raises(RuntimeError, match="freed since the capture"):
        replay(graph)


def test_memory_of_a_graph_goes_with_it():
    before = used()
    x = torch.ones(1000, device="cuda")
    graph, y = graph_of(lambda x: (x * 2) * 3, x)
    assert used() >= before + 12000  # with what was freed during the capture
    graph.replay()
    assert y.sum() == 6000
    del graph
    assert y.sum() == 6000  # still ours
    del x, y
    assert used() <= before + 2 * 4096  # pages of the generator's seed and offset


def used():
    memory = ctypes.CDLL("libcudart.so.13").cudasim_memory
    memory.restype = ctypes.c_size_t
    return memory()


def test_make_graphed_callables():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.LayerNorm(16), torch.nn.Linear(16, 4)
    ).cuda()
    sample = torch.randn(5, 8, device="cuda", requires_grad=True)

    def step(call, x):
        for p in net.parameters():
            p.grad = None
        x = x.clone().requires_grad_()
        y = call(x)
        y.square().sum().backward()
        return [y.detach().clone(), x.grad.clone(), *(p.grad.clone() for p in net.parameters())]

    inputs = [torch.randn(5, 8, device="cuda") for _ in range(3)]
    expected = [step(net, x) for x in inputs]
    graphed = torch.cuda.make_graphed_callables(net, (sample,))
    for x, want in zip(inputs, expected, strict=True):
        for a, b in zip(step(graphed, x), want, strict=True):
            torch.testing.assert_close(a, b)


def test_whole_training_steps():
    def train(graphed):
        torch.manual_seed(0)
        net = torch.nn.Linear(6, 1).cuda()
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, capturable=True)
        x, y, losses = torch.zeros(16, 6, device="cuda"), torch.zeros(16, 1, device="cuda"), []

        def step():
            optimizer.zero_grad(set_to_none=True)
            loss = torch.nn.functional.mse_loss(net(x), y)
            loss.backward()
            optimizer.step()
            return loss

        generator = torch.Generator().manual_seed(1)
        graph = None
        for i in range(8):
            batch = torch.randn(16, 6, generator=generator)
            x.copy_(batch), y.copy_(batch.sum(1, keepdim=True))
            if graphed and i == 3:
                graph = torch.cuda.CUDAGraph()
                optimizer.zero_grad(set_to_none=True)
                with torch.cuda.graph(graph):
                    static = step()
            if graph:
                graph.replay()
                losses.append(static.item())
            else:
                losses.append(step().item())
        return losses

    torch.testing.assert_close(train(True), train(False))


# ---- the calls
@pytest.fixture
def cudart():
    lib = ctypes.CDLL("libcudart.so.13")
    yield lib
    lib.cudaGetLastError()


@pytest.fixture
def stream(cudart):
    return make_stream(cudart)


def make_stream(cudart, flags=NONBLOCKING):
    s = ctypes.c_void_p()
    assert cudart.cudaStreamCreateWithFlags(ctypes.byref(s), flags) == SUCCESS
    return s


def make_event(cudart):
    e = ctypes.c_void_p()
    assert cudart.cudaEventCreate(ctypes.byref(e)) == SUCCESS
    return e


@contextlib.contextmanager
def capture(cudart, stream, expected=SUCCESS, mode=GLOBAL):
    assert cudart.cudaStreamBeginCapture(stream, mode) == SUCCESS
    graph = ctypes.c_void_p()
    yield graph
    assert cudart.cudaStreamEndCapture(stream, ctypes.byref(graph)) == expected
    assert bool(graph) == (expected == SUCCESS)


def launch(cudart, graph, stream):
    executable = ctypes.c_void_p()
    assert cudart.cudaGraphInstantiate(ctypes.byref(executable), graph, ctypes.c_ulonglong(0)) == SUCCESS
    assert cudart.cudaGraphLaunch(executable, stream) == SUCCESS
    return executable


def test_nodes(cudart, stream):
    x, host = torch.zeros(4, device="cuda"), (ctypes.c_float * 4)(1, 2, 3, 4)
    calls = []
    callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda data: calls.append(x.tolist()))
    pointer = ctypes.c_void_p(x.data_ptr())
    with capture(cudart, stream) as graph:
        status, identity = ctypes.c_int(), ctypes.c_ulonglong()
        assert (
            cudart.cudaStreamGetCaptureInfo(
                stream, ctypes.byref(status), ctypes.byref(identity), None, None, None, None
            )
            == SUCCESS
        )
        assert status.value == 1
        assert identity.value > 0
        assert cudart.cudaMemcpyAsync(pointer, host, ctypes.c_size_t(16), 1, stream) == SUCCESS
        assert cudart.cudaMemsetAsync(pointer, 0, ctypes.c_size_t(8), stream) == SUCCESS
        assert cudart.cudaLaunchHostFunc(stream, callback, None) == SUCCESS
    assert x.tolist() == [0] * 4
    assert not calls
    count, kinds = ctypes.c_size_t(), []
    assert cudart.cudaGraphGetNodes(graph, None, ctypes.byref(count)) == SUCCESS
    nodes = (ctypes.c_void_p * count.value)()
    assert cudart.cudaGraphGetNodes(graph, nodes, ctypes.byref(count)) == SUCCESS
    for node in nodes:
        kind = ctypes.c_int()
        assert cudart.cudaGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)) == SUCCESS
        kinds.append(kind.value)
    assert kinds == [1, 2, 3]  # copy, fill, host function
    executable = launch(cudart, graph, stream)
    assert calls == [[0, 0, 3, 4]]
    host[3] = 9  # read when the graph is launched
    assert cudart.cudaGraphDestroy(graph) == SUCCESS
    assert cudart.cudaGraphLaunch(executable, stream) == SUCCESS
    assert calls[1] == [0, 0, 3, 9]
    assert cudart.cudaGraphExecDestroy(executable) == SUCCESS


def test_a_graph_within_a_graph(cudart, stream):
    x = torch.ones(2, device="cuda")
    pointer = ctypes.c_void_p(x.data_ptr())
    with capture(cudart, stream) as inner:
        assert cudart.cudaMemsetAsync(pointer, 0, ctypes.c_size_t(4), stream) == SUCCESS
    executable = ctypes.c_void_p()
    assert cudart.cudaGraphInstantiate(ctypes.byref(executable), inner, ctypes.c_ulonglong(0)) == SUCCESS
    with capture(cudart, stream) as outer:
        assert cudart.cudaGraphLaunch(executable, stream) == SUCCESS
    assert x.tolist() == [1, 1]
    cudart.cudaGraphExecDestroy(executable)
    launch(cudart, outer, stream)
    assert x.tolist() == [0, 1]


def test_unsafe_calls_end_a_capture(cudart, stream):
    p = ctypes.c_void_p()
    with capture(cudart, stream, INVALIDATED):
        assert cudart.cudaMalloc(ctypes.byref(p), ctypes.c_size_t(8)) == UNSUPPORTED
        status = ctypes.c_int()
        cudart.cudaStreamIsCapturing(stream, ctypes.byref(status))
        assert status.value == 2
        assert cudart.cudaMemsetAsync(p, 0, ctypes.c_size_t(8), stream) == INVALIDATED
    with capture(cudart, stream, mode=RELAXED):
        assert cudart.cudaMalloc(ctypes.byref(p), ctypes.c_size_t(8)) == SUCCESS
        assert cudart.cudaFree(p) == SUCCESS
    with capture(cudart, stream):
        mode = ctypes.c_int(RELAXED)
        assert cudart.cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode)) == SUCCESS
        assert mode.value == GLOBAL
        assert cudart.cudaMalloc(ctypes.byref(p), ctypes.c_size_t(8)) == SUCCESS
        assert cudart.cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode)) == SUCCESS
    with capture(cudart, stream, INVALIDATED):
        assert cudart.cudaMemcpy(p, p, ctypes.c_size_t(8), 3) == UNSUPPORTED
    with capture(cudart, stream, INVALIDATED):
        assert cudart.cudaStreamQuery(stream) == UNSUPPORTED
    cudart.cudaFree(p)


def test_legacy_stream_during_a_capture(cudart):
    p, blocking, free = torch.zeros(2, device="cuda"), make_stream(cudart, 0), make_stream(cudart)
    pointer = ctypes.c_void_p(p.data_ptr())
    with capture(cudart, blocking, INVALIDATED):
        assert cudart.cudaMemsetAsync(pointer, 1, ctypes.c_size_t(8), None) == IMPLICIT
    with capture(cudart, free):
        assert cudart.cudaMemsetAsync(pointer, 1, ctypes.c_size_t(8), None) == SUCCESS  # done now
    assert p.view(torch.int32).tolist() == [0x01010101] * 2
    assert cudart.cudaStreamBeginCapture(None, GLOBAL) == UNSUPPORTED


def test_events_during_a_capture(cudart, stream):
    inside, outside, other = make_event(cudart), make_event(cudart), make_stream(cudart)
    assert cudart.cudaEventRecord(outside, other) == SUCCESS
    with capture(cudart, stream, INVALIDATED):
        assert cudart.cudaEventQuery(outside) == UNSUPPORTED
    with capture(cudart, stream):
        assert cudart.cudaEventRecord(inside, stream) == SUCCESS
        assert cudart.cudaEventQuery(inside) == CAPTURED_EVENT
    x = torch.zeros(1, device="cuda")
    with capture(cudart, stream, UNJOINED):
        assert cudart.cudaEventRecord(inside, stream) == SUCCESS
        assert cudart.cudaStreamWaitEvent(other, inside, 0) == SUCCESS
        assert cudart.cudaMemsetAsync(ctypes.c_void_p(x.data_ptr()), 0, ctypes.c_size_t(4), other) == SUCCESS
    assert cudart.cudaStreamEndCapture(stream, ctypes.byref(ctypes.c_void_p())) == ILLEGAL_STATE


def test_memory_of_a_stream(cudart, stream):
    p = ctypes.c_void_p()
    with capture(cudart, stream) as graph:
        assert cudart.cudaMallocAsync(ctypes.byref(p), ctypes.c_size_t(64), stream) == SUCCESS
        assert cudart.cudaMemsetAsync(p, 7, ctypes.c_size_t(64), stream) == SUCCESS
        assert cudart.cudaFreeAsync(p, stream) == SUCCESS
    cudart.cudaGraphExecDestroy(launch(cudart, graph, stream))
    cudart.cudaGraphDestroy(graph)
