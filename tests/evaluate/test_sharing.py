"""How sequences are cut so that what they have in common is there once."""

import random

from llm.evaluate.sharing import Forest, Tokens


def ids(draw: random.Random, length: int, kinds: int = 100) -> tuple[int, ...]:
    return tuple(draw.randrange(kinds) for _ in range(length))


def computed(forest: Forest) -> int:
    return sum(map(len, forest.pieces))


def test_the_pieces_of_a_sequence_are_all_of_it():
    draw = random.Random(1)
    for trial in range(300):
        sequences = [Tokens(ids(draw, draw.randrange(1, 14), 2 + trial % 4)) for _ in range(draw.randrange(1, 20))]
        forest = Forest(sequences)
        for number, sequence in enumerate(sequences):
            made: list[int] = []
            for piece in (forest.pieces[i] for i in forest.path(number)):
                assert piece.start == len(made) and len(piece) > 0
                made += sequences[piece.owner].ids[piece.start : piece.end]
            assert tuple(made) == sequence.ids


def test_choices_share_their_context_and_all_documents_the_examples_before_them():
    draw = random.Random(0)
    examples = ids(draw, 400)
    contexts = [examples + ids(draw, 12) for _ in range(50)]
    sequences = [Tokens(context + ids(draw, 5)) for context in contexts for _ in range(4)]
    # a choice may begin like another by chance, so a few tokens fewer
    assert 400 + 50 * (12 + 4 * 5) >= computed(Forest(sequences)) > 1900


def test_a_short_beginning_that_is_alike_by_chance_is_not_shared():
    draw = random.Random(0)
    sequences = [Tokens((1, 2, 3, 4, 5) + ids(draw, 60)) for _ in range(50)]
    assert computed(Forest(sequences)) == 50 * 65


def test_sequences_with_other_images_share_nothing_and_images_are_whole():
    text = tuple(range(30))
    apart = [Tokens(text, apart=image) for image in ("a", "b")]
    assert computed(Forest(apart)) == 60
    differ = [Tokens(text[:20] + (last,) * 5, apart="a", whole=whole) for last in (50, 51) for whole in (22,)]
    assert computed(Forest(differ)) == 50
    assert computed(Forest([Tokens(tokens.ids, "a", 10) for tokens in differ])) == 30


def test_how_sequences_are_cut_does_not_depend_on_their_order():
    draw = random.Random(2)
    sequences = [Tokens(ids(draw, draw.randrange(1, 30), 2)) for _ in range(60)]
    order = draw.sample(range(60), 60)

    def cuts(forest: Forest, number: int) -> list[int]:
        return [forest.pieces[piece].end for piece in forest.path(number)]

    first, second = Forest(sequences), Forest([sequences[i] for i in order])
    assert [cuts(first, i) for i in order] == [cuts(second, place) for place in range(60)]
