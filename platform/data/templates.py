"""The words of composed questions and answers. `{objects}` and `{named}` are filled in; `{seg}` stays as the marker."""

#: One target (or all of one category).
SINGLE_QUESTIONS = (
    "Can you segment {objects} in this image?",
    "Please segment {objects}.",
    "Where is the mask of {objects}?",
    "Show me {objects} in the picture.",
    "Outline {objects} for me, please.",
    "I would like a segmentation of {objects}.",
    "Find {objects} in this photo and mark the pixels.",
    "Which pixels belong to {objects}?",
    "Mark {objects}.",
    "Could you cut out {objects} from this picture?",
)

#: Several things at once.
MULTI_QUESTIONS = (
    "Can you segment {objects} in this image?",
    "Please segment {objects}.",
    "Segment {objects}, each with its own mask.",
    "Show me {objects} in the picture, one by one.",
    "I need separate masks for {objects}.",
    "Find {objects} in this photo.",
    "Outline {objects} separately, please.",
    "Which pixels belong to {objects}?",
    "Mark each of these: {objects}.",
    "Could you cut out {objects} from this picture?",
)

#: The answer to a question for one target. The name stands directly before its group: a small network then sees it at
#: the very position that predicts the group (EXPERIMENTS.md, "Names beside their groups").
SINGLE_ANSWERS = (
    "Sure, here is {named} {seg}.",
    "This is {named} {seg}.",
    "{Named} {seg}.",
    "Of course, this is {named} {seg}.",
    "I found {named} {seg}.",
    "Here you see {named} {seg}.",
)

#: The answer to a question for several: `{listed}` is "the cat {seg}, the dog {seg} and the laptop {seg}".
MULTI_ANSWERS = (
    "Sure, here are {listed}.",
    "I can see {listed}.",
    "These are {listed}.",
    "{Listed}.",
    "Of course: {listed}.",
    "Here you are: {listed}, separately.",
)
