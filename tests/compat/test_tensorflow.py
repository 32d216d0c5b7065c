# SPDX-License-Identifier: Apache-2.0
import gc
import logging
import re

import numpy as np
import pytest
import torch

from transducer_toolkit import losses
from transducer_toolkit.compat import tensorflow as tf_fast_rnnt

tf = pytest.importorskip("tensorflow", exc_type=ImportError)

NUM_BATCHES = 100
TYPES = ("regular", "modified", "constrained")
GRADIENTS_OF = ("lm", "am", "logits", "px", "py")
# The examples of tf_fast_rnnt's README, word for word. What they leave open is GIVEN.
SIMPLE_EXAMPLE = """
am = np.random.randn(B, T, C).astype('f')
lm = np.random.randn(B, S + 1, C).astype('f')
symbols = np.random.randint(0, C - 1, (B, S)).astype(np.int64)
terminal_symbol = C - 1

boundary = np.zeros((B, 4))
boundary[:, 2] = seq_length
boundary[:, 3] = frames
boundary = tf.convert_to_tensor(boundary, dtype=tf.int64)

simple_loss, (px_grad, py_grad) = tf_fast_rnnt.rnnt_loss_simple(
    lm=lm,
    am=am,
    symbols=symbols,
    termination_symbol=terminal_symbol,
    boundary=boundary,
    rnnt_type=rnnt_type,
    return_grad=True,
    reduction="none",
    delay_penalty=0.2,
)
"""
PRUNED_EXAMPLE = (
    SIMPLE_EXAMPLE
    + """s_range = 5  # can be other values
ranges = tf_fast_rnnt.get_rnnt_prune_ranges(
    px_grad=px_grad,
    py_grad=py_grad,
    boundary=boundary,
    s_range=s_range,
)

am_pruned, lm_pruned = tf_fast_rnnt.do_rnnt_pruning(am=am, lm=lm, ranges=ranges)

logits = model.joiner(am_pruned, lm_pruned)
pruned_loss = tf_fast_rnnt.rnnt_loss_pruned(
    logits=logits,
    symbols=symbols,
    ranges=ranges,
    termination_symbol=termination_symbol,
    boundary=boundary,
    reduction="sum",
)
"""
)
GIVEN = """
import numpy as np
import tensorflow as tf
import IMPORT

class model:
    joiner = staticmethod(lambda am, lm: tf.sigmoid(am + lm))

np.random.seed(1)
B, T, S, C = 2, 10, 7, 4
frames, seq_length = np.array([10, 8]), np.array([7, 5])
rnnt_type, termination_symbol = "regular", C - 1
"""


@pytest.fixture(autouse=True)
def no_warnings_of_autograph():
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    tf.get_logger().addHandler(handler)
    yield
    tf.get_logger().removeHandler(handler)
    assert not [record for record in records if "AutoGraph" in record.getMessage()]


def example(text):
    names = {}
    given = GIVEN.replace(
        "import IMPORT", "from transducer_toolkit.compat import tensorflow as tf_fast_rnnt"
    )
    exec(given + text, names)
    return names


def test_example_of_the_simple_loss():
    names = example(SIMPLE_EXAMPLE)
    inputs = [torch.tensor(names[n]) for n in ("lm", "am", "symbols")]
    boundary = torch.tensor(names["boundary"].numpy())
    expected, (px_grad, py_grad) = losses.rnnt_loss_simple(
        *inputs, 3, boundary, "regular", 0.2, "none", return_grad=True
    )
    for name, value in (("simple_loss", expected), ("px_grad", px_grad), ("py_grad", py_grad)):
        assert isinstance(names[name], tf.Tensor)
        np.testing.assert_array_equal(names[name].numpy(), value.numpy())


def test_example_of_the_pruned_loss():
    names = example(PRUNED_EXAMPLE)
    assert names["ranges"].dtype == tf.int32 and names["ranges"].shape == (2, 10, 5)
    symbols, ranges, boundary = (
        torch.tensor(np.asarray(names[n])) for n in ("symbols", "ranges", "boundary")
    )
    am, lm = losses.do_rnnt_pruning(torch.tensor(names["am"]), torch.tensor(names["lm"]), ranges)
    logits = torch.sigmoid(am + lm)
    expected = losses.rnnt_loss_pruned(logits, symbols, ranges, 3, boundary, reduction="sum")
    assert names["pruned_loss"].numpy() == pytest.approx(expected.item(), rel=1e-6)


# --- the same numbers as the PyTorch functions ----------------------------------------------------


def random_batch(seed, *, dtype=np.float32):
    """Tensors by name, and the sizes, of a batch with uneven lengths; some have no symbols."""
    random = np.random.default_rng(seed)
    num_utterances, num_symbols = random.integers(1, 4), random.integers(0, 6)
    num_frames = num_symbols + random.integers(1, 6)
    vocab_size = random.integers(2, 9)
    values = {
        "am": (num_utterances, num_frames, vocab_size),
        "lm": (num_utterances, num_symbols + 1, vocab_size),
        "logits": (num_utterances, num_frames, num_symbols + 1, vocab_size),
        "py": (num_utterances, num_symbols + 1, num_frames),
    }
    is_regular = seed % 3 == 0
    values["px"] = (num_utterances, num_symbols, num_frames + is_regular)
    batch = {name: 2 * random.standard_normal(shape) for name, shape in values.items()}
    batch = {name: value.astype(dtype) for name, value in batch.items()}
    index_dtype = np.int32 if seed % 2 else np.int64
    batch["symbols"] = random.integers(0, vocab_size, (num_utterances, num_symbols), index_dtype)
    lengths = random.integers(0, num_symbols + 1, num_utterances)
    frames = random.integers(num_symbols + 1, num_frames + 1, num_utterances)
    zeros = np.zeros_like(frames)
    boundary = np.stack((zeros, zeros, lengths, frames), 1).astype(index_dtype)
    batch["boundary"] = boundary if seed % 4 else None
    width = int(random.integers(2, 5))
    tensors = {name: torch.tensor(batch[name]) for name in ("lm", "am", "symbols")}
    tensors["boundary"] = None if batch["boundary"] is None else torch.tensor(boundary)
    rest = {"termination_symbol": 0, "rnnt_type": TYPES[seed % 3], "return_grad": True}
    _, posteriors = losses.rnnt_loss_simple(**tensors, **rest)
    ranges = losses.get_rnnt_prune_ranges(*posteriors, tensors["boundary"], width)
    batch["ranges"] = ranges.numpy().astype(index_dtype)
    batch["px_grad"], batch["py_grad"] = (p.numpy() for p in posteriors)
    num_columns = batch["ranges"].shape[2]
    band = (num_utterances, num_frames, num_columns, vocab_size)
    batch["band"] = random.standard_normal(band).astype(dtype)
    return batch


def options_of(seed):
    return {"termination_symbol": 0, "rnnt_type": TYPES[seed % 3]}


def loss_options(seed):
    reduction = ("none", "mean", "sum")[seed // 3 % 3]
    return options_of(seed) | {"delay_penalty": 0.1 * (seed % 2), "reduction": reduction}


CASES = {
    "rnnt_loss": (("logits", "symbols", "boundary"), loss_options),
    "rnnt_loss_simple": (("lm", "am", "symbols", "boundary"), loss_options),
    "rnnt_loss_smoothed": (("lm", "am", "symbols", "boundary"), loss_options),
    "rnnt_loss_pruned": (("band", "symbols", "ranges", "boundary"), loss_options),
    "get_rnnt_logprobs": (("lm", "am", "symbols", "boundary"), options_of),
    "get_rnnt_logprobs_smoothed": (("lm", "am", "symbols", "boundary"), options_of),
    "get_rnnt_logprobs_joint": (("logits", "symbols", "boundary"), options_of),
    "get_rnnt_logprobs_pruned": (("band", "symbols", "ranges", "boundary"), options_of),
    "do_rnnt_pruning": (("am", "lm", "ranges"), lambda seed: {}),
    "mutual_information_recursion": (("px", "py", "boundary"), lambda seed: {}),
    "get_rnnt_prune_ranges": (
        ("px_grad", "py_grad", "boundary"),
        lambda seed: {"s_range": 2 + seed % 3},
    ),
}
WITH_POSTERIORS = ("rnnt_loss", "rnnt_loss_simple", "rnnt_loss_smoothed")
WITH_POSTERIORS += ("mutual_information_recursion",)


def case(name, seed, **options):
    """Arguments of the function `name`, as NumPy arrays and options."""
    names, make_options = CASES[name]
    batch = random_batch(seed)
    arguments = {"logits" if n == "band" else n: batch[n] for n in names}
    if name in WITH_POSTERIORS:
        options["return_grad"] = seed % 2 == 1
    return arguments, make_options(seed) | options


def flat(result):
    if not isinstance(result, tuple):
        return [result]
    return [tensor for part in result for tensor in flat(part)]


def torch_results(name, arguments, options):
    """Returns the outputs and the gradients of their weighted sum."""
    tensors = {n: None if v is None else torch.tensor(v) for n, v in arguments.items()}
    wanted = [tensors[n].requires_grad_() for n in tensors if n in GRADIENTS_OF]
    outputs = flat(getattr(losses, name)(**tensors, **options))
    total = torch.zeros(())
    for output in outputs:
        if output.requires_grad:
            weights = torch.arange(output.numel()).cos().reshape(output.shape)
            total = total + (torch.where(output.isfinite(), output, 0) * weights).sum()
    gradients = torch.autograd.grad(total, wanted) if wanted else []
    return [tensor.detach().numpy() for tensor in (*outputs, *gradients)]


def tensorflow_results(name, arguments, options):
    """As :func:`torch_results`."""
    wanted = [arguments[n] for n in arguments if n in GRADIENTS_OF]
    with tf.GradientTape() as tape:
        tape.watch(wanted)
        outputs = flat(getattr(tf_fast_rnnt, name)(**arguments, **options))
        total = tf.zeros(())
        for output in outputs:
            if wanted:
                weights = tf.cos(tf.range(tf.cast(tf.size(output), tf.float32)))
                finite = tf.where(tf.math.is_finite(output), output, tf.zeros_like(output))
                total += tf.reduce_sum(finite * tf.reshape(weights, tf.shape(output)))
    return outputs + (tape.gradient(total, wanted) if wanted else [])


def as_tensors(arguments):
    return {n: None if v is None else tf.constant(v) for n, v in arguments.items()}


def assert_same(results, expected, num_outputs):
    assert len(results) == len(expected)
    for result, value in zip(results[:num_outputs], expected, strict=False):
        np.testing.assert_array_equal(result.numpy(), value)
    for result, value in zip(results[num_outputs:], expected[num_outputs:], strict=True):
        np.testing.assert_allclose(result.numpy(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_torch_function(name):
    for seed in range(NUM_BATCHES):
        arguments, options = case(name, seed)
        expected = torch_results(name, arguments, options)
        results = tensorflow_results(name, as_tensors(arguments), options)
        assert all(isinstance(result, tf.Tensor) for result in results)
        num_gradients = sum(n in GRADIENTS_OF for n in arguments)
        assert_same(results, expected, len(results) - num_gradients)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_torch_function_in_a_graph(name):
    for seed in (1, 2, 3):  # every topology, and one of them without a boundary
        arguments, options = case(name, 4 * seed if seed == 3 else seed)
        expected = torch_results(name, arguments, options)
        in_graph = tf.function(
            lambda given, options=options: tensorflow_results(name, given, options)
        )
        results = in_graph(as_tensors(arguments))
        num_gradients = sum(n in GRADIENTS_OF for n in arguments)
        assert_same(results, expected, len(results) - num_gradients)
        assert len(in_graph.pretty_printed_concrete_signatures().split("Input Parameters")) == 2


def test_signatures_take_positional_arguments_in_the_order_of_tf_fast_rnnt():
    arguments, _ = case("rnnt_loss_smoothed", 1)
    lm, am, symbols, boundary = arguments.values()
    loss, posteriors = tf_fast_rnnt.rnnt_loss_smoothed(
        lm, am, symbols, 0, 0.2, 0.3, boundary, "modified", 0.1, "sum", True
    )
    tensors = [torch.tensor(v) for v in (lm, am, symbols)]
    rest = 0, 0.2, 0.3, torch.tensor(boundary), "modified", 0.1, "sum", True
    assert loss.numpy() == losses.rnnt_loss_smoothed(*tensors, *rest)[0].item()
    assert len(posteriors) == 2


# --- graphs and trainings -------------------------------------------------------------------------


def test_shapes_are_known_in_a_graph():
    seen = {}

    @tf.function
    def trace(lm, am, symbols):
        loss, (px_grad, py_grad) = tf_fast_rnnt.rnnt_loss_simple(
            lm, am, symbols, 0, reduction="none", return_grad=True
        )
        ranges = tf_fast_rnnt.get_rnnt_prune_ranges(px_grad, py_grad, None, 3)
        pruned = tf_fast_rnnt.do_rnnt_pruning(am, lm, ranges)
        seen.update(loss=loss.shape, px=px_grad.shape, py=py_grad.shape, ranges=ranges.shape)
        seen.update(am=pruned[0].shape, lm=pruned[1].shape)
        return pruned[1]

    lm, am, symbols = tf.zeros([2, 4, 5]), tf.zeros([2, 6, 5]), tf.ones([2, 3], tf.int32)
    assert trace(lm, am, symbols).shape == (2, 6, 3, 5)
    assert {name: tuple(shape) for name, shape in seen.items()} == {
        "loss": (2,),
        "px": (2, 3, 7),
        "py": (2, 4, 6),
        "ranges": (2, 6, None),
        "am": (2, 6, None, 5),
        "lm": (2, 6, None, 5),
    }


def test_axes_and_numbers_that_the_graph_does_not_know():
    arguments, options = case("rnnt_loss", 2)
    options.pop("termination_symbol")
    options.pop("delay_penalty")
    signature = [tf.TensorSpec(None, tf.float32), tf.TensorSpec([None, None], tf.int64)]
    signature += [tf.TensorSpec([], tf.int32), tf.TensorSpec([], tf.float32)]

    @tf.function(input_signature=signature)
    def loss(logits, symbols, blank, delay_penalty):
        return tf_fast_rnnt.rnnt_loss(
            logits, symbols, blank, delay_penalty=delay_penalty, **options
        )

    logits, symbols = arguments["logits"], arguments["symbols"].astype(np.int64)
    tensors = torch.tensor(logits), torch.tensor(symbols)
    for blank, penalty in ((0, 0.0), (1, 0.25)):
        expected = losses.rnnt_loss(*tensors, blank, delay_penalty=penalty, **options)
        result = loss(tf.constant(logits), tf.constant(symbols), blank, penalty)
        np.testing.assert_array_equal(result.numpy(), expected.numpy())


def test_every_pass_of_a_loop_has_its_own_gradient():
    """TensorFlow's gradient of tf.py_function mixes the passes of a loop up."""
    logits = tf.random.stateless_normal([3, 2, 4, 3, 5], [1, 2])
    symbols = tf.constant([[1, 2], [3, 4]])

    @tf.function
    def gradient(logits):
        with tf.GradientTape() as tape:
            tape.watch(logits)
            total = tf.zeros(())
            for i in tf.range(3):
                scale = tf.cast(i + 1, tf.float32)
                total += scale * tf_fast_rnnt.rnnt_loss(logits[i], symbols, 0)
        return tape.gradient(total, logits)

    expected = torch.tensor(logits.numpy(), requires_grad=True)
    parts = [losses.rnnt_loss(part, torch.tensor(symbols.numpy()), 0) for part in expected]
    (parts[0] + 2 * parts[1] + 3 * parts[2]).backward()
    np.testing.assert_allclose(gradient(logits), expected.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_a_keras_model_learns(run_eagerly):
    num_utterances, num_frames, num_symbols, vocab_size = 4, 8, 3, 6
    tf.keras.utils.set_random_seed(0)
    features = tf.random.normal([num_utterances, num_frames, 5])
    symbols = tf.random.uniform([num_utterances, num_symbols], 1, vocab_size, tf.int64)
    boundary = tf.constant([[0, 0, 3, 8], [0, 0, 2, 6], [0, 0, 3, 7], [0, 0, 0, 8]], tf.int64)

    class Transducer(tf.keras.Model):
        def __init__(self):
            super().__init__()
            self.encoder = tf.keras.layers.Dense(vocab_size)
            self.predictor = tf.keras.layers.Embedding(vocab_size, vocab_size)
            self.output_layer = tf.keras.layers.Dense(vocab_size)

        def call(self, inputs):
            features, symbols, boundary = inputs
            am, lm = self.encoder(features), self.predictor(tf.pad(symbols, [[0, 0], [1, 0]]))
            simple_loss, posteriors = tf_fast_rnnt.rnnt_loss_simple(
                lm, am, symbols, 0, boundary, return_grad=True
            )
            ranges = tf_fast_rnnt.get_rnnt_prune_ranges(*posteriors, boundary, 3)
            am_pruned, lm_pruned = tf_fast_rnnt.do_rnnt_pruning(am, lm, ranges)
            logits = self.output_layer(tf.nn.tanh(am_pruned + lm_pruned))
            loss = tf_fast_rnnt.rnnt_loss_pruned(logits, symbols, ranges, 0, boundary)
            return 0.5 * simple_loss + loss

    model = Transducer()
    model.compile(
        optimizer=tf.keras.optimizers.Adam(0.05),
        loss=lambda target, loss: loss,
        run_eagerly=run_eagerly,
        jit_compile=False,
    )
    data = tf.data.Dataset.from_tensors(((features, symbols, boundary), tf.zeros([])))
    history = model.fit(data.repeat(12), steps_per_epoch=1, epochs=12, verbose=0).history["loss"]
    assert history[-1] < 0.5 * history[0]
    for layer in (model.encoder, model.predictor, model.output_layer):
        assert len(layer.trainable_variables) > 0
    with tf.GradientTape() as tape:
        loss = model((features, symbols, boundary))
    gradients = tape.gradient(loss, model.trainable_variables)
    assert all(float(tf.norm(tf.convert_to_tensor(g))) > 0 for g in gradients)


# --- memory ---------------------------------------------------------------------------------------


def test_eager_tensors_are_not_copied(monkeypatch):
    seen = []

    def spy(logits, *arguments, **options):
        seen.append(logits.data_ptr())
        return losses.rnnt_loss_spied(logits, *arguments, **options)

    monkeypatch.setattr(losses, "rnnt_loss_spied", losses.rnnt_loss, raising=False)
    monkeypatch.setattr(losses, "rnnt_loss", spy)
    logits, symbols = tf.random.normal([2, 4, 3, 5]), tf.constant([[1, 2], [3, 4]])
    address = torch.utils.dlpack.from_dlpack(tf.experimental.dlpack.to_dlpack(logits)).data_ptr()
    with tf.GradientTape() as tape:
        tape.watch(logits)
        loss = tf_fast_rnnt.rnnt_loss(logits, symbols, 0)
    tape.gradient(loss, logits)
    assert seen == [address, address]  # forward and backward


def test_outputs_share_no_memory_with_inputs():
    """TensorFlow may write over an output. A band of one column would be a view of am."""
    am, lm = tf.random.normal([1, 3, 4]), tf.random.normal([1, 1, 4])
    before = am.numpy().copy()
    am_pruned, _ = tf_fast_rnnt.do_rnnt_pruning(am, lm, tf.zeros([1, 3, 1], tf.int32))
    view = torch.utils.dlpack.from_dlpack(tf.experimental.dlpack.to_dlpack(am_pruned))
    view.zero_()
    np.testing.assert_array_equal(am.numpy(), before)


def test_a_variable_may_change_between_forward_and_backward():
    variable = tf.Variable(tf.random.normal([2, 4, 3, 5]))
    symbols = tf.constant([[1, 2], [3, 4]])
    expected = torch.tensor(variable.numpy(), requires_grad=True)
    losses.rnnt_loss(expected, torch.tensor(symbols.numpy()), 0).backward()
    with tf.GradientTape() as tape:
        loss = tf_fast_rnnt.rnnt_loss(variable, symbols, 0)
    variable.assign_add(tf.random.normal(variable.shape))
    np.testing.assert_allclose(tape.gradient(loss, variable), expected.grad, rtol=1e-6)


def test_nothing_is_kept():
    logits, symbols = tf.random.normal([2, 4, 3, 5]), tf.constant([[1, 2], [3, 4]])

    def step():
        with tf.GradientTape() as tape:
            tape.watch(logits)
            loss = tf_fast_rnnt.rnnt_loss(logits, symbols, 0)
        return tape.gradient(loss, logits)

    def num_tensors():
        gc.collect()
        return sum(isinstance(thing, (torch.Tensor, tf.Tensor)) for thing in gc.get_objects())

    for function in (step, tf.function(step)):
        function()
        before = num_tensors()
        for _ in range(5):
            function()
        assert num_tensors() == before


# --- dtypes and bad input -------------------------------------------------------------------------


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes(dtype, in_graph):
    random = np.random.default_rng(3)
    logits = tf.cast(tf.constant(random.standard_normal((2, 4, 3, 5))), dtype)
    symbols = np.array([[1, 2], [3, 4]])

    def value_and_gradient(logits):
        with tf.GradientTape() as tape:
            tape.watch(logits)
            loss = tf_fast_rnnt.rnnt_loss(logits, symbols, 0)
        return loss, tape.gradient(loss, logits)

    loss, gradient = (tf.function(value_and_gradient) if in_graph else value_and_gradient)(logits)
    exact = torch.tensor(tf.cast(logits, tf.float64).numpy()).to(getattr(torch, dtype))
    exact.requires_grad_()
    expected = losses.rnnt_loss(exact, torch.tensor(symbols), 0)
    expected.backward()
    assert loss.dtype.name == ("float64" if dtype == "float64" else "float32")
    assert gradient.dtype.name == dtype
    assert loss.numpy() == expected.item()
    np.testing.assert_array_equal(tf.cast(gradient, tf.float64), exact.grad.double())


LOGITS = np.zeros((2, 4, 3, 5), np.float32)
SYMBOLS = np.array([[1, 2], [3, 4]])
BAD = [
    ({"boundary": np.zeros((2, 4))}, TypeError, "boundary: expected dtype int32, int64"),
    ({"boundary": np.array([[0, 0, 2, 9]] * 2)}, ValueError, "boundary[0] (utterance 0)"),
    ({"symbols": np.array([[1, 2], [3, 5]])}, ValueError, "symbols[1, 1]"),
    ({"symbols": SYMBOLS[:1]}, ValueError, "logits: expected shape (1, T, 3, V)"),
    ({"termination_symbol": 5}, ValueError, "termination_symbol: expected 0 <="),
    ({"termination_symbol": 1.5}, TypeError, "termination_symbol: expected an int"),
    ({"delay_penalty": -1.0}, ValueError, "delay_penalty: expected a finite number >= 0"),
]
BAD_AT_ONCE = [
    ({"reduction": "avg"}, ValueError, "reduction: expected one of"),
    ({"rnnt_type": "modifed"}, ValueError, "rnnt_type: expected one of"),
    ({"return_grad": 1}, TypeError, "return_grad: expected a bool, got int"),
    ({"logits": torch.zeros(2, 4, 3, 5)}, TypeError, "NumPy array, got a torch.Tensor"),
    (
        {"logits": None},
        TypeError,
        "logits: expected a TensorFlow tensor or a NumPy array, got None",
    ),
    ({"logits": np.zeros((2, 4, 3, 5), complex)}, TypeError, "logits: expected dtype float16,"),
    ({"symbols": tf.constant([["a", "b"]] * 2)}, TypeError, "float64, int32, int64, got string"),
    ({"symbols": tf.ragged.constant([[1, 2], [3]])}, TypeError, "NumPy array, got RaggedTensor"),
    ({"symbols": tf.sparse.from_dense(SYMBOLS)}, TypeError, "NumPy array, got SparseTensor"),
    ({"symbols": [[1, 2], [3]]}, TypeError, "symbols: expected a TensorFlow tensor or a NumPy"),
    ({"logits": tf.keras.Input((4, 3, 5))}, TypeError, "NumPy array, got KerasTensor"),
    ({"delay_penalty": tf.zeros([2])}, TypeError, "delay_penalty: expected a number, got shape"),
]


def loss_of(change):
    given = {"logits": LOGITS, "symbols": SYMBOLS, "termination_symbol": 0} | change
    return tf_fast_rnnt.rnnt_loss(**given)


@pytest.mark.parametrize(("change", "error", "message"), BAD + BAD_AT_ONCE)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=re.escape(message)):
        loss_of(change)


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_values_in_a_graph(change, error, message):
    with pytest.raises(tf.errors.InvalidArgumentError, match=re.escape(message)) as raised:
        tf.function(lambda: loss_of(change))()
    assert error.__name__ in str(raised.value)


@pytest.mark.parametrize(("change", "error", "message"), BAD_AT_ONCE)
def test_bad_options_are_found_when_the_graph_is_made(change, error, message):
    with pytest.raises(error, match=re.escape(message)):
        tf.function(lambda: loss_of(change)).get_concrete_function()


def test_columns_outside_of_lm():
    with pytest.raises(ValueError, match=r"ranges\[0, 1, 0\] \(utterance 0\): expected a column"):
        tf_fast_rnnt.do_rnnt_pruning(tf.zeros([1, 2, 4]), tf.zeros([1, 3, 4]), [[[2], [3]]])


@pytest.mark.parametrize("in_graph", [False, True])
def test_a_second_derivative_is_refused(in_graph):
    logits = tf.random.normal([2, 4, 3, 5])

    def second(logits):
        with tf.GradientTape() as outer:
            outer.watch(logits)
            with tf.GradientTape() as inner:
                inner.watch(logits)
                loss = tf_fast_rnnt.rnnt_loss(logits, SYMBOLS, 0)
            gradient = inner.gradient(loss, logits)
        return outer.gradient(gradient, logits)

    with pytest.raises(RuntimeError, match="expected a first derivative, got a second one"):
        (tf.function(second) if in_graph else second)(logits)


def test_posteriors_have_no_gradient():
    logits = tf.random.normal([2, 4, 3, 5])
    with tf.GradientTape() as tape:
        tape.watch(logits)
        _, (px_grad, _) = tf_fast_rnnt.rnnt_loss(logits, SYMBOLS, 0, return_grad=True)
    assert tape.gradient(px_grad, logits) is None
