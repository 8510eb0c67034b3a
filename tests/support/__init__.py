"""What the tests of several files share; no test stands here, and none imports another test module."""
