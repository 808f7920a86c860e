"""`cvlctl build-dataset`: episodes of online learners, at random, by experts, policies or from other stores."""
