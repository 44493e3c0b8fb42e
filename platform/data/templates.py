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

#: A class of things or stuff as a whole ("the sky"), or a part ("the handle of the mug").
CLASS_QUESTIONS = (
    "Can you segment {objects} in this image?",
    "Segment {objects} as a whole.",
    "Where in the picture is {objects}?",
    "Please give me one mask that covers {objects}.",
    "Label every pixel that shows {objects}.",
    "Which part of the image is {objects}?",
    "Mask out {objects}, please.",
    "I want to know which pixels are {objects}.",
    "Select {objects}.",
    "Separate {objects} from the rest of the picture.",
)

#: Several classes or parts at once.
CLASSES_QUESTIONS = (
    "Can you segment {objects} in this image?",
    "Divide the picture: {objects}.",
    "Please give me one mask each for {objects}.",
    "Label the pixels of {objects}.",
    "Mask out {objects}, one after the other.",
    "Show which regions are {objects}.",
    "Select {objects}, separately.",
    "I need to tell {objects} apart.",
)

#: One thing described by a referring expression.
REFERRING_QUESTIONS = (
    "Please segment {objects}.",
    "Can you point out {objects}?",
    "Which one is {objects}? Mark it.",
    "Where is {objects}?",
    "Segment this: {objects}.",
    "Find {objects} and outline it.",
    "I mean {objects}. Can you show me the mask?",
    "Look for {objects} in this photo.",
    "Highlight {objects}, please.",
    "Show me exactly {objects}.",
)

#: Several things, each described by an expression.
REFERRINGS_QUESTIONS = (
    "Please segment {objects}.",
    "Can you point out {objects}?",
    "Mark each of these: {objects}.",
    "Find {objects} and outline them.",
    "Where are {objects}?",
    "Highlight {objects}, each on its own.",
    "Look for {objects} in this photo.",
    "I need masks of {objects}.",
)

#: The answer where the picture does not hold what was asked for.
ABSENT_ANSWERS = (
    "I cannot see {named} in this picture.",
    "There is nothing here that would be {named}.",
    "This picture does not show {named}.",
    "{Named}? No, not in this image.",
    "I looked for {named} and found nothing.",
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
