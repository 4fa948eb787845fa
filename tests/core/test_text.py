"""Numbers and tables as a person reads them."""

from tessera.core.errors import UserError
from tessera.core.text import counted, duration, human, human_range, mib, number_range, table_lines


def test_ranges_of_bytes_name_each_unit_that_differs():
    said = {(512, 512): "512 B", (512, 768): "512–768 B", (992, 1024): "992 B–1 KiB", (1024, 2**20): "1 KiB–1 MiB"}
    assert {sizes: human_range(sizes) for sizes in said} == said


def test_numbers_keep_three_digits_or_their_thousands():
    assert [human(1023), human(32600), human(2**41)] == ["1023 B", "31.8 KiB", "2 TiB"]
    assert mib(1536 * 2**20) == "1,536.0"
    assert [number_range((5000, 5000)), number_range((7000, 5000))] == ["5,000", "5,000–7,000"]


def test_columns_of_a_table_are_as_wide_as_their_widest_cell():
    assert table_lines([("axis", "ranks"), ("replicate", "2")]) == ["  axis        ranks", "  replicate   2"]


def test_one_thing_is_no_several():
    assert [counted(n, "row") for n in (0, 1, 2, 5000)] == ["0 rows", "1 row", "2 rows", "5,000 rows"]


def test_a_time_is_told_in_units_that_fit_it():
    said = {3.4: "3 s", 99: "99 s", 100: "2 min", 5900: "98 min", 7500: "2 h 5 min", 200_000: "2 days"}
    assert {seconds: duration(seconds) for seconds in said} == said


def test_an_error_writes_true_and_false_as_yaml_does():
    error = UserError("streaming", True, "is not possible")
    assert str(error) == str(UserError(*error.parts)) == "streaming: true\n  is not possible"
