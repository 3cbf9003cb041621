"""What messages share."""

from covo_npu.kernels.errors import first_line, listed


def test_the_first_items_and_how_many_more_there_are():
    assert listed([]) == ""
    assert listed(["a", "b"]) == "a; b"
    assert listed([str(i) for i in range(10)]) == "0; 1; 2; 3; 4; 5; 6; 7; 8; 9"
    assert listed([str(i) for i in range(12)]).endswith("9; ... and 2 more")
    assert listed(["a", "b", "c"], shown=1, separator="\n  ") == "a\n  ... and 2 more"


def test_the_first_line_of_an_error():
    assert first_line(RuntimeError("call aclnnSwiGlu failed\nmore")) == "call aclnnSwiGlu failed"
    assert first_line(MemoryError()) == "MemoryError"
