"""The order of one file's prompts and of a mixture's, against counting and a naive version."""

from collections import Counter
from fractions import Fraction
from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from treepo.config.data import TrainFileConfig, whole_weights
from treepo.data.prompt_order import MixtureOrder, PromptOrder, one_cycle

WEIGHTS = st.lists(st.one_of(st.integers(1, 4), st.integers(1, 300)), min_size=1, max_size=9)


@given(n=st.integers(1, 40), seed=st.integers(0, 3), epoch=st.integers(0, 3))
def test_every_epoch_holds_every_prompt_once(n: int, seed: int, epoch: int) -> None:
    order = PromptOrder(n, seed)
    positions = range(epoch * n, (epoch + 1) * n)
    assert sorted(map(order.index, positions)) == list(range(n))
    assert all(PromptOrder(n, seed).index(position) == order.index(position) for position in positions)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        order = PromptOrder(50, seed)
        return [order.index(position) for position in range(50 * number, 50 * (number + 1))]

    # Two of 50! orders are equal with a probability of 1e-64.
    assert len({tuple(epoch(seed, number)) for seed in (1, 2) for number in (0, 1, 2)}) == 6


@given(weights=WEIGHTS)
def test_every_prefix_holds_each_files_share_to_within_one_prompt(weights: list[int]) -> None:
    order, total = mixture(weights), sum(weights)
    turns = Counter[int]()
    for position in range(2 * total + 3):
        turns[order.turn(position)[0]] += 1
        for file, weight in enumerate(weights):
            assert abs(turns[file] - Fraction(weight * (position + 1), total)) < 1


@given(weights=WEIGHTS)
def test_the_cycle_is_that_of_the_naive_rule(weights: list[int]) -> None:
    """Of the files that may come, the one whose last position is nearest: looked for file by file."""
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    turns = [0] * len(weights)
    for position, found in enumerate(one_cycle(tuple(weights))):
        may = [file for file, share in enumerate(shares) if turns[file] // share <= position]
        file = min(may, key=lambda each: (-(-(turns[each] + 1) // shares[each]), each))
        assert found == file
        turns[file] += 1


@given(weights=WEIGHTS, position=st.integers(0, 10_000))
def test_positions_and_turns_are_each_others_inverse(weights: list[int], position: int) -> None:
    order = mixture(weights)
    file, turn = order.turn(position)
    assert order.position(file, turn) == position
    assert order.turns_before(file, position) == turn
    assert sum(order.turns_before(each, position) for each in range(len(weights))) == position


@given(weights=st.lists(st.integers(1, 30), min_size=1, max_size=4), window=st.integers(1, 40))
def test_the_most_turns_within_a_window(weights: list[int], window: int) -> None:
    order = mixture(weights)
    files = [order.turn(position)[0] for position in range(sum(weights) + window)]
    for file in range(len(weights)):
        most = max(files[begin : begin + window].count(file) for begin in range(sum(weights)))
        assert order.most_turns(file, window) == most


@given(weights=st.lists(st.integers(1, 12), min_size=1, max_size=4), data=st.data())
def test_the_largest_step_that_no_file_is_too_small_for(weights: list[int], data: st.DataObject) -> None:
    sizes = [data.draw(st.integers(1, 30)) for _ in weights]
    order = MixtureOrder({str(file): size for file, size in enumerate(sizes)}, weights, seed=0)
    fitting = [
        window
        for window in range(1, sum(sizes) + 2)
        if all(order.most_turns(file, window) <= size for file, size in enumerate(sizes))
    ]
    assert fitting == list(range(1, order.largest_step + 1))
    assert PromptOrder(sizes[0], 0).largest_step == sizes[0]


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=4), data=st.data())
def test_each_file_is_passed_through_in_epochs_of_its_own(sizes: list[int], data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes)))
    order = MixtureOrder({f"file{number}": size for number, size in enumerate(sizes)}, weights, seed=3)
    indices: list[list[int]] = [[] for _ in sizes]
    for position in range(200):
        indices[order.turn(position)[0]].append(order.index(position))
    start = 0
    for size, own in zip(sizes, indices, strict=True):
        for begin in range(0, len(own), size):
            epoch = own[begin : begin + size]
            assert set(epoch) <= set(range(start, start + size))
            assert len(set(epoch)) == len(epoch), "no prompt again before all others of the file"
        start += size
    assert len(order) == start


@given(size=st.integers(2, 30), weights=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_the_order_of_a_file_does_not_depend_on_the_others(size: int, weights: tuple[int, int]) -> None:
    def of_b(order: MixtureOrder, file: int, start: int) -> list[int]:
        return [order.index(order.position(file, turn)) - start for turn in range(3 * size)]

    alone = of_b(MixtureOrder({"b": size}, [1], 7), 0, 0)
    assert alone == of_b(MixtureOrder({"a": 5, "b": size}, weights, 7), 1, 5)
    assert alone == of_b(MixtureOrder({"b": size, "c": 9, "d": 2}, (*weights, 4), 7), 0, 0)


def test_files_have_orders_of_their_own() -> None:
    """Two of 50! orders are equal with a probability of 1e-64."""
    order = MixtureOrder({"a": 50, "b": 50}, [1, 1], 0)
    first, second = ([order.index(order.position(file, turn)) for turn in range(50)] for file in (0, 1))
    assert first != [index - 50 for index in second]


def mixture(weights: list[int]) -> MixtureOrder:
    return MixtureOrder({f"file{number}": 5 for number in range(len(weights))}, weights, 0)


def test_weights_are_whole_numbers_in_the_ratio_that_was_written() -> None:
    for weights, whole in (
        ((3, 1), [3, 1]),
        ((0.75, 0.5), [3, 2]),
        ((0.1, 0.2, 0.7), [1, 2, 7]),
        ((1e-3, 1), [1, 1000]),
        ((7473, 12000), [2491, 4000]),
    ):
        names = (f"file{number}" for number in count())
        files = [TrainFileConfig.model_validate({"path": next(names), "weight": each}) for each in weights]
        assert whole_weights(files) == whole
