"""Objects of which a process has one."""

from typing import Optional

from typing_extensions import Self


class Singleton:
    """Base of classes with one object a process. ``get_instance`` makes it when it is first asked for and starts it with ``_set_up``."""

    _instance: Optional["Singleton"] = None

    def __init__(self):
        raise RuntimeError(f"{type(self).__name__} is shared by the whole process: call {type(self).__name__}.get_instance()")

    @classmethod
    def get_instance(cls) -> Self:
        """The one object of this class."""
        if cls._instance is None:
            instance = cls.__new__(cls)
            instance._set_up()
            cls._instance = instance
        return cls._instance

    def _set_up(self) -> None:
        """Gives a new object its state."""
