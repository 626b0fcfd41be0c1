"""How a source is read where it does not say so itself: the section `reading` of a curation config, which travels with each unit of work."""

import dataclasses

CAPTIONS = ("ask", "whole", "lines")
UNCAPTIONED = ("drop", "keep", "file_name")


class NeedsAnswer(ValueError):
  """The source can be read in two ways, and only its owner knows which is right: one sentence that says what to add to the command."""


@dataclasses.dataclass(frozen=True)
class Reading:
  """What only the owner of a source knows.

  Attributes:
    captions: what a caption file with several lines is: one text ("whole"), a caption per line ("lines"), or a question to the user ("ask").
    uncaptioned: what becomes of a picture without a caption: it is dropped as unreadable ("drop"), is a record without captions, such as a VAE
      takes ("keep"), or has its file name as caption, with spaces for underscores ("file_name").
    picture_root: folder that the paths of a table are below, absolute ones too; "" for the folder of the table.
  """
  captions: str = "ask"
  uncaptioned: str = "drop"
  picture_root: str = ""

  def __post_init__(self):
    for name, choices in (("captions", CAPTIONS), ("uncaptioned", UNCAPTIONED)):
      if getattr(self, name) not in choices:
        raise ValueError(f"config.reading.{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}.")

  def texts(self, text: str, name: str) -> list[str]:
    """Returns the captions of a caption file, without the blank lines around them.

    Raises:
      NeedsAnswer: there are several lines, and nobody has said what they are.
    """
    # Not splitlines: it also cuts at characters such as U+2028, which may stand inside a caption.
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if len(lines) > 1 and self.captions == "ask":
      raise NeedsAnswer(f"The caption file {name!r} has {len(lines)} lines: say --captions=lines if each line is a caption, or --captions=whole "
                        "if the whole file is one.")
    return lines if self.captions == "lines" else [text][:len(lines)]
