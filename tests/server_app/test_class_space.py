"""The class space of all clients: one that names many classes cannot crowd out the others."""

from fedmmkt.server_app.class_space import limited


def test_all_classes_are_taken_if_they_are_few():
    assert limited([("cat", "dog"), ("dog", "owl")], holders=1, most=3) == {"cat", "dog", "owl"}


def test_a_class_may_need_several_holders():
    assert limited([("cat", "dog", "dog"), ("dog", "owl")], holders=2, most=3) == {"dog"}


def test_of_too_many_those_of_several_clients_and_then_each_clients_first_are_taken():
    invented = tuple(f"a{number}" for number in range(200))

    taken = limited([("cat", "dog"), ("dog", "owl"), invented], holders=1, most=5)

    assert taken == {"dog", "cat", "a0", "owl", "a1"}
