"""A worker that needs nothing: what starting it takes is not its own."""


class Hello:
    def hello(self) -> int:
        return 1
