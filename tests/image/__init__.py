"""The image's rehearsal (``make rehearse-image``), and the reader of Dockerfiles that it shares with the tests."""
